"""Scores from reward models, functions of text, functions of tokens, and sums of them."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jaxtyping import Array, Float

from effscale.generation.decoding import Generated
from effscale.models import Transformer
from effscale.parallel.placement import gathered, on_devices
from effscale.rlhf.scoring import response_scores

Reward = Callable[[Generated, Mapping[str, Any]], Any]
"""``reward(drawn, batch)`` returns a score for each response, given the responses and the batch of prompts with any other fields.

If a run has several processes, each of them calls it with all responses and with whole arrays; other fields, such as lists,
must be the same in each process."""


TextReward = Callable[..., Sequence[float]]
"""``function(prompts, responses, **fields)`` returns a number for each response, given as text; ``fields`` are the other fields of the batch."""


@dataclasses.dataclass(frozen=True)
class ModelReward:
    """Scores from a reward model that reads the policy's tokens.

    Args:
        model: The reward model. It can be in host memory, see ``effscale.parallel.to_host_memory``.
        head: Name of its head of one class with ``pool="last"``.
    """

    model: Transformer
    head: str = "score"

    def __call__(self, drawn: Generated, batch: Mapping[str, Any]) -> Float[Array, "batch"]:
        """Return the score of each response."""
        return _score(on_devices(self.model), drawn.tokens, drawn.mask, self.head)


_score = jax.jit(
    lambda model, tokens, mask, head: response_scores(model, tokens, mask, head=head),
    static_argnums=3,
)


def from_text(tokenizer: tokenizers.Tokenizer, function: TextReward) -> Reward:
    """Return a reward from a function of text: a rule, a classifier, or a reward model with another tokenizer.

    Args:
        tokenizer: The policy's tokenizer.
        function: ``function(prompts, responses)`` returns a number for each response. It runs on the host. The text
            has no special tokens. The function also gets the fields of the batch that its parameters name, or all fields
            if it takes ``**fields``.

    Example:
        >>> from effscale.data import train_tokenizer
        >>> tokenizer = train_tokenizer(["thank you", "thank them"], vocab_size=300)
        >>> reward = from_text(tokenizer, lambda prompts, responses: [float("you" in r) for r in responses])
    """
    try:
        named = inspect.signature(function).parameters
    except ValueError:  # some built-in functions have no signature
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
    """Compute the score of each response, summed over rewards.

    Args:
        rewards: One reward, or several by name.
        drawn: The responses.
        batch: Their prompts.
        weights: Weights of rewards by name; the default is 1.

    Returns:
        The scores, and for several rewards the mean of each, as ``score_<name>``.

    Raises:
        ValueError: A reward does not return one finite, real number per response, or a weight has the name of no reward.
    """
    named = rewards if isinstance(rewards, Mapping) else {"": rewards}
    weights = {} if weights is None else weights
    whole = None
    if unknown := sorted(set(weights) - set(named)):
        raise ValueError(f"weights must have names of rewards, {sorted(named)}, got {unknown}")
    total = np.zeros(drawn.tokens.shape[0], np.float32)
    metrics: dict[str, float] = {}
    for name, reward in named.items():
        if isinstance(reward, ModelReward):
            scores = gathered(reward(drawn, batch))
        else:
            whole = whole or jax.tree.map(_whole, (drawn, dict(batch)))
            scores = gathered(reward(*whole))
        what = f"the reward {name!r}" if name else "the reward"
        if not any(
            jnp.issubdtype(scores.dtype, kind) for kind in (jnp.floating, jnp.integer, bool)
        ):
            raise ValueError(f"{what} must return real numbers, got the dtype {scores.dtype}")
        scores = scores.astype(np.float32)
        if scores.shape != total.shape:
            raise ValueError(
                f"{what} must return one number for each of the {len(total)} responses, got the shape {scores.shape}"
            )
        if not np.isfinite(scores).all():
            bad = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise ValueError(
                f"{what} must be finite, got {scores[bad]} for response {bad} of the batch"
            )
        total += np.float32(weights.get(name, 1.0)) * scores
        if name:
            metrics[f"score_{name}"] = float(scores.mean())
    return jnp.asarray(total), metrics


def _whole(x: Any) -> Any:
    """Return an array that spans several processes as one of this process, and anything else as it is."""
    spans = isinstance(x, jax.Array) and not x.is_fully_addressable
    return jnp.asarray(gathered(x)) if spans else x
