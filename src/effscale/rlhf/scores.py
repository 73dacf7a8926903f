"""Where scores come from: reward models, functions of text, functions of tokens, and sums of them."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tokenizers
from jaxtyping import Array, Float

from effscale.generation import Generated
from effscale.models import Transformer
from effscale.parallel import on_devices
from effscale.rlhf.scoring import response_scores

Reward = Callable[[Generated, Mapping[str, Any]], Any]
"""``reward(drawn, batch)``: a score for each response, from the responses and the batch of prompts with all that you put beside them."""


TextReward = Callable[..., Sequence[float]]
"""``function(prompts, responses, **fields)``: a number for each response, given as text; ``fields`` are what the batch holds beside the tokens."""


@dataclasses.dataclass(frozen=True)
class ModelReward:
    """Scores by a reward model that reads the policy's tokens.

    Args:
        model: The reward model. It may lie in host memory, see ``effscale.parallel.to_host_memory``.
        head: Name of its head of one class with ``pool="last"``.
    """

    model: Transformer
    head: str = "score"

    def __call__(self, drawn: Generated, batch: Mapping[str, Any]) -> Float[Array, "batch"]:
        """The score of each response."""
        return _score(on_devices(self.model), drawn.tokens, drawn.mask, self.head)


_score = jax.jit(
    lambda model, tokens, mask, head: response_scores(model, tokens, mask, head=head),
    static_argnums=3,
)


def from_text(tokenizer: tokenizers.Tokenizer, function: TextReward) -> Reward:
    """A reward from a function of text, such as a rule, a classifier, or a reward model with another tokenizer.

    Args:
        tokenizer: The policy's.
        function: ``function(prompts, responses)`` gives a number for each response. It runs on the host. Special tokens are not in the text. Of the
            batch's other fields it is given those that its parameters name, or all if it takes ``**fields``.

    Example:
        >>> from effscale.data import train_tokenizer
        >>> tokenizer = train_tokenizer(["thank you", "thank them"], vocab_size=300)
        >>> reward = from_text(tokenizer, lambda prompts, responses: [float("you" in r) for r in responses])
    """
    try:
        named = inspect.signature(function).parameters
    except ValueError:  # some functions that are built in do not tell theirs
        named = {}
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in named.values())

    def reward(drawn: Generated, batch: Mapping[str, Any]) -> Any:
        tokens, mask = np.asarray(drawn.tokens), np.asarray(drawn.mask)
        prompt = batch["input_ids"].shape[1]
        text = lambda cut: [
            tokenizer.decode(row[cut][real[cut]].tolist())
            for row, real in zip(tokens, mask, strict=True)
        ]
        fields = {
            name: value
            for name, value in batch.items()
            if name not in ("input_ids", "attention_mask", "text") and (takes_all or name in named)
        }
        return function(text(slice(None, prompt)), text(slice(prompt, None)), **fields)

    return reward


def total_score(
    rewards: Reward | Mapping[str, Reward],
    drawn: Generated,
    batch: Mapping[str, Any],
    weights: Mapping[str, float] | None = None,
) -> tuple[Float[Array, "batch"], dict[str, float]]:
    """The score of each response, summed over rewards.

    Args:
        rewards: One, or several by name.
        drawn: Responses.
        batch: Their prompts.
        weights: Of rewards by name; 1 where none is given.

    Returns:
        The scores, and of several rewards the mean of each, as ``score_<name>``.

    Raises:
        ValueError: A reward is not one finite number for each response; or a weight is of no reward.
    """
    named = rewards if isinstance(rewards, Mapping) else {"": rewards}
    weights = {} if weights is None else weights
    if unknown := sorted(set(weights) - set(named)):
        raise ValueError(f"weights for {unknown}, but the rewards are {sorted(named)}")
    total = np.zeros(drawn.tokens.shape[0], np.float32)
    metrics: dict[str, float] = {}
    for name, reward in named.items():
        scores = np.asarray(reward(drawn, batch), np.float32)
        what = f"the reward {name!r}" if name else "the reward"
        if scores.shape != total.shape:
            raise ValueError(
                f"{what} gave {scores.shape}: it must give one number for each of the {len(total)} responses"
            )
        if not np.isfinite(scores).all():
            bad = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise ValueError(f"{what} is {scores[bad]} for response {bad} of the batch")
        total += np.float32(weights.get(name, 1.0)) * scores
        if name:
            metrics[f"score_{name}"] = float(scores.mean())
    return jax.numpy.asarray(total), metrics
