"""From drawn and scored responses to what a policy learns from: advantages beside the tokens, and returns where there is a critic."""

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from effscale.generation import Generated
from effscale.rlhf.advantages import gae, group_advantages, leave_one_out_advantages, whiten
from effscale.rlhf.config import GroupConfig, LearningConfig, PPOConfig
from effscale.rlhf.rewards import kl_estimate, shaped_rewards, with_next


@typing.no_type_check  # JAX makes it of shapes and placeholders, too
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experience:
    """Responses with all that a policy and its critic learn from.

    Attributes:
        tokens: Prompts and responses.
        mask: True at real tokens.
        learned: True at the response's tokens that are learned.
        log_probs: Of the response's tokens, under the policy that drew them.
        advantages: Of each.
        values: The critic's, before each of them; None without a critic.
        returns: What the critic should have said; None without a critic.
        reference_log_probs: The reference's, where divergence is a part of the loss; else None.
        text: Rows of ordinary text for ``pretraining_coef``, as many as responses: a batch of ``effscale.training.next_token_loss``; else None.
    """

    tokens: Int[Array, "batch total"]
    mask: Bool[Array, "batch total"]
    learned: Bool[Array, "batch response"]
    log_probs: Float[Array, "batch response"]
    advantages: Float[Array, "batch response"]
    values: Float[Array, "batch response"] | None = None
    returns: Float[Array, "batch response"] | None = None
    reference_log_probs: Float[Array, "batch response"] | None = None
    text: Any = None

    def rows(self, index: Int[Array, "rows"]) -> "Experience":
        """The responses of these numbers."""
        return jax.tree.map(lambda a: a[index], self)

    def minibatches(self, number: int, key: PRNGKeyArray) -> Iterator["Experience"]:
        """The batch in a new order, cut into so many parts.

        Raises:
            ValueError: The parts would not be of equal size.
        """
        for index in minibatch_rows(self.tokens.shape[0], number, key):
            yield self.rows(index)


def minibatch_rows(rows: int, number: int, key: PRNGKeyArray) -> Int[Array, "number rows"]:
    """The numbers of all rows in a new order, cut into so many parts.

    Raises:
        ValueError: The parts would not be of equal size.
    """
    if number < 1 or rows % number:
        raise ValueError(f"number={number}: must be a divisor of the {rows} responses")
    return jax.random.permutation(key, rows).reshape(number, -1)


def make_experience(
    drawn: Generated,
    reference_log_probs: Float[Array, "batch response"],
    values: Float[Array, "batch response"],
    scores: Float[Array, "batch"],
    *,
    stop_ids: Sequence[int] = (),
    config: PPOConfig = PPOConfig(),
    kl_coef: Float[Array, ""] | float | None = None,
) -> tuple[Experience, dict[str, Float[Array, ""]]]:
    """PPO's rewards, advantages and returns of responses that were drawn and scored.

    Args:
        drawn: From ``effscale.generation.decode`` with ``log_probs=True``.
        reference_log_probs: The reference's, see ``effscale.rlhf.response_log_probs``, at the temperature of the drawing.
        values: The critic's, see ``effscale.rlhf.response_values``.
        scores: Of whole responses: a reward model's or a function's.
        stop_ids: Tokens that end a response, as ``drawn`` had them; needed for ``missing_end_penalty`` and its metric, and for ``learn_end=False``.
        config: How rewards are made.
        kl_coef: The price of divergence in place of the config's, where it changes.

    Returns:
        The experience, and metrics: ``score`` (as given), ``score_std`` (over responses), ``kl`` (of a response, in nats), ``length``, ``ended`` (the share of
        responses that ended before they were cut off).

    Raises:
        ValueError: ``drawn`` has no log-probabilities.
    """
    log_probs, mask, learned, kl, paid, metrics = _scored(
        drawn, reference_log_probs, scores, stop_ids, config
    )
    reach = with_next(mask) if config.score_at == "next" else mask
    rewards = shaped_rewards(
        paid,
        kl,
        reach,
        kl_coef=config.kl_coef if kl_coef is None else kl_coef,
        clip=config.score_clip,
    )
    if config.whiten_rewards:
        rewards = whiten(rewards, reach, keep_mean=True)
    values = jnp.where(reach, values, 0.0)
    advantages, returns = gae(rewards, values, reach, gamma=config.gamma, lam=config.lam)
    if config.whiten_advantages:
        advantages = whiten(advantages, learned)
    given = (drawn.tokens, drawn.mask, learned, log_probs, advantages)
    return Experience(*given, values=values, returns=returns), metrics


def make_group_experience(
    drawn: Generated,
    reference_log_probs: Float[Array, "batch response"],
    scores: Float[Array, "batch"],
    *,
    stop_ids: Sequence[int] = (),
    config: GroupConfig = GroupConfig(),
) -> tuple[Experience, dict[str, Float[Array, ""]]]:
    """Advantages of responses over the others to the same prompt, as in GRPO and RLOO; no critic is needed.

    Args:
        drawn: As in ``make_experience``; responses to one prompt stand side by side.
        reference_log_probs: As in ``make_experience``.
        scores: As in ``make_experience``.
        stop_ids: As in ``make_experience``.
        config: How advantages are made.

    Returns:
        The experience, and metrics: those of ``make_experience``, and ``equal_groups``, the share of prompts all of whose responses have one score, so that
        nothing is learned from them.

    Raises:
        ValueError: ``drawn`` has no log-probabilities, or the responses are no whole groups.
    """
    log_probs, mask, learned, kl, paid, metrics = _scored(
        drawn, reference_log_probs, scores, stop_ids, config
    )
    if config.score_clip is not None:
        paid = jnp.clip(paid, -config.score_clip, config.score_clip)
    if config.kl_in == "reward":
        paid = paid - config.kl_coef * kl.sum(1)
    if config.advantage == "group":
        each = group_advantages(paid, config.group_size, scale=config.scale)
    else:
        each = leave_one_out_advantages(paid, config.group_size)
    groups = paid.reshape(-1, config.group_size)
    metrics["equal_groups"] = (groups == groups[:, :1]).all(1).astype(jnp.float32).mean()
    advantages = jnp.where(mask, each[:, None], 0.0)
    reference = reference_log_probs if config.kl_in == "loss" else None
    given = (drawn.tokens, drawn.mask, learned, log_probs, advantages)
    return Experience(*given, reference_log_probs=reference), metrics


def _scored(
    drawn: Generated,
    reference_log_probs: Array,
    scores: Array,
    stop_ids: Sequence[int],
    config: LearningConfig,
) -> tuple[Array, Array, Array, Array, Array, dict[str, Array]]:
    """Log-probabilities of the response, its mask, what of it is learned, the divergence of each token, the scores less what is paid for a missing end, and metrics."""
    if drawn.log_probs is None:
        raise ValueError("drawn.log_probs is None: call decode with log_probs=True")
    response = drawn.log_probs.shape[1]
    mask = drawn.mask[:, -response:]
    stops = jnp.asarray(stop_ids, jnp.int32)
    is_stop = (drawn.tokens[:, -response:, None] == stops[None, None]).any(-1)
    ended = (is_stop & mask).any(1)
    kl = jnp.where(
        mask, kl_estimate(drawn.log_probs, reference_log_probs, config.kl_estimator), 0.0
    )
    paid = scores - config.missing_end_penalty * (~ended).astype(scores.dtype)
    number = lambda x: x.astype(jnp.float32).mean()
    metrics = {
        "score": scores.mean(),
        "score_std": scores.std(),
        "kl": kl.sum(1).mean(),
        "length": number(drawn.num_new),
        "ended": number(ended),
    }
    learned = mask if config.learn_end else mask & ~is_stop
    return drawn.log_probs, mask, learned, kl, paid, metrics
