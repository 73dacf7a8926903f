"""Convert generated and scored responses to training data for a policy: advantages of the tokens, and returns if there is a critic."""

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from effscale.generation.decoding import Generated
from effscale.rlhf.advantages import gae, group_advantages, leave_one_out_advantages, whiten
from effscale.rlhf.config import GroupConfig, LearningConfig, PPOConfig
from effscale.rlhf.rewards import kl_estimate, shaped_rewards, with_next


@typing.no_type_check  # JAX makes it of shapes and placeholders, too
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experience:
    """Responses with everything that a policy and its critic learn from.

    Attributes:
        tokens: Prompts and responses.
        mask: True at real tokens.
        learned: True at the response's tokens that are trained on.
        log_probs: Log-probabilities of the response's tokens under the policy that generated them.
        advantages: Advantage of each token.
        values: The critic's value before each token; None without a critic.
        returns: The targets of the critic; None without a critic.
        reference_log_probs: Log-probabilities under the reference model, if the divergence is part of the loss;
            otherwise None.
        text: Rows of ordinary text for ``pretraining_coef``, the same number as responses: a batch for
            ``effscale.training.next_token_loss``; otherwise None.
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
        """Return the responses with these indices."""
        return jax.tree.map(lambda a: a[index], self)

    def minibatches(self, number: int, key: PRNGKeyArray) -> Iterator["Experience"]:
        """Yield the batch in a new order, split into ``number`` equal parts.

        Raises:
            ValueError: The parts would not be of equal size.
        """
        for index in minibatch_rows(self.tokens.shape[0], number, key):
            yield self.rows(index)


def minibatch_rows(rows: int, number: int, key: PRNGKeyArray) -> Int[Array, "number rows"]:
    """Return the indices of all rows in a new order, split into ``number`` equal parts.

    Raises:
        ValueError: The parts would not be of equal size.
    """
    if number < 1 or rows % number:
        raise ValueError(f"number must divide the number of responses, {rows}, got {number}")
    return jax.random.permutation(key, rows).reshape(number, -1)


def make_experience(
    drawn: Generated,
    reference_log_probs: Float[Array, "batch response"],
    values: Float[Array, "batch response"],
    scores: Float[Array, "batch"],
    *,
    stop_token_ids: Sequence[int] = (),
    config: PPOConfig = PPOConfig(),
    kl_coef: Float[Array, ""] | float | None = None,
) -> tuple[Experience, dict[str, Float[Array, ""]]]:
    """Compute PPO's rewards, advantages and returns for generated and scored responses.

    Args:
        drawn: Responses from ``effscale.generation.decode`` with ``log_probs=True``.
        reference_log_probs: Log-probabilities under the reference model at the sampling temperature, see
            ``effscale.rlhf.response_log_probs``.
        values: Values of the critic, see ``effscale.rlhf.response_values``.
        scores: Scores of whole responses, from a reward model or a function.
        stop_token_ids: Tokens that end a response, the same as for ``drawn``; needed for ``missing_end_penalty`` and its
            metric, and for ``learn_end=False``.
        config: Options of PPO.
        kl_coef: The KL coefficient, if it changes; None uses that of ``config``.

    Returns:
        The experience, and metrics: ``score`` (as given), ``score_std`` (over responses), ``kl`` (per response, in
        nats), ``length``, ``ended`` (the share of responses that ended before they were cut off).

    Raises:
        ValueError: ``drawn`` has no log-probabilities.
    """
    log_probs, mask, learned, kl, paid, metrics = _scored(
        drawn, reference_log_probs, scores, stop_token_ids, config
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
    stop_token_ids: Sequence[int] = (),
    config: GroupConfig = GroupConfig(),
) -> tuple[Experience, dict[str, Float[Array, ""]]]:
    """Compute the advantages of responses relative to the others for the same prompt, as in GRPO and RLOO, without a critic.

    Args:
        drawn: As in ``make_experience``; responses to the same prompt are adjacent.
        reference_log_probs: As in ``make_experience``.
        scores: As in ``make_experience``.
        stop_token_ids: As in ``make_experience``.
        config: Options of GRPO and RLOO.

    Returns:
        The experience, and metrics: those of ``make_experience``, and ``equal_groups``, the share of prompts whose
        responses all have the same score, so that nothing is learned from them.

    Raises:
        ValueError: ``drawn`` has no log-probabilities, or the responses do not form whole groups.
    """
    log_probs, mask, learned, kl, paid, metrics = _scored(
        drawn, reference_log_probs, scores, stop_token_ids, config
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
    stop_token_ids: Sequence[int],
    config: LearningConfig,
) -> tuple[Array, Array, Array, Array, Array, dict[str, Array]]:
    """Return the log-probabilities of the response, its mask, the mask of trained tokens, the divergence of each token, the scores minus the
    penalty for a missing end, and metrics.
    """
    if drawn.log_probs is None:
        raise ValueError("drawn.log_probs must be set, got None. Call decode with log_probs=True")
    response = drawn.log_probs.shape[1]
    mask = drawn.mask[:, -response:]
    stops = jnp.asarray(stop_token_ids, jnp.int32)
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
