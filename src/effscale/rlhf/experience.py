"""From drawn responses to what PPO learns from: advantages and returns beside the tokens, and the two losses over them."""

import dataclasses
import math
import typing
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from effscale.generation import Generated
from effscale.models import Transformer
from effscale.models.validation import check, choice
from effscale.rlhf.advantages import gae, whiten
from effscale.rlhf.policy_loss import PolicyLossConfig, policy_loss, value_loss
from effscale.rlhf.rewards import KLEstimator, kl_estimate, shaped_rewards, with_next
from effscale.rlhf.scoring import response_log_probs, response_values
from effscale.training import Loss, add_reports


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """What PPO makes of responses and scores.

    The defaults are what is usual today. DeepSpeed-Chat's are ``kl_coef=0.1, score_clip=5.0, whiten_advantages=False, score_at="next"``; TRL 1.12 has
    ``score_at="next"``, and trains both models by one optimizer on the policy's loss plus 0.1 times the critic's.
    """

    kl_coef: float = 0.05
    """The price of divergence from the reference, for each nat."""
    kl_estimator: KLEstimator = "k1"
    """How the divergence is estimated, see :func:`effscale.rlhf.kl_estimate`."""
    score_clip: float | None = None
    """Scores are clipped to plus and minus this; None: not at all."""
    score_at: Literal["last", "next"] = "last"
    """Where the score stands: at the last token of a response, or in the place after it, as in DeepSpeed-Chat and TRL."""
    missing_end_penalty: float = 0.0
    """Taken off the score of a response that was cut off before it ended."""
    gamma: float = 1.0
    """Discount."""
    lam: float = 0.95
    """Of generalized advantage estimation."""
    whiten_rewards: bool = False
    """Give the rewards of a batch a variance of 1."""
    whiten_advantages: bool = True
    """Give the advantages of a batch a mean of 0 and a variance of 1."""
    policy: PolicyLossConfig = PolicyLossConfig()
    """Clips and averages of the policy's loss."""
    value_clip: float | None = 0.2
    """How far a value may move in one batch of responses; None: without bound."""
    entropy_coef: float = 0.0
    """Reward for a nat of entropy, in the policy's loss."""

    def __post_init__(self):
        for name in ("kl_coef", "missing_end_penalty", "entropy_coef"):
            check(self, 0 <= getattr(self, name) < math.inf, name, "0 or more, and finite")
        for name in ("score_clip", "value_clip"):
            value = getattr(self, name)
            check(self, value is None or 0 < value < math.inf, name, "above 0 and finite, or None")
        for name in ("gamma", "lam"):
            check(self, 0 <= getattr(self, name) <= 1, name, "from 0 to 1")
        choice(self, "kl_estimator", typing.get_args(KLEstimator))
        choice(self, "score_at", ("last", "next"))


@typing.no_type_check  # JAX makes it of shapes and placeholders, too
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experience:
    """Responses with all that PPO learns from.

    Attributes:
        tokens: Prompts and responses.
        mask: True at real tokens.
        log_probs: Of the response's tokens, under the policy that drew them.
        values: The critic's, before each of them.
        advantages: Of each.
        returns: What the critic should have said.
    """

    tokens: Int[Array, "batch total"]
    mask: Bool[Array, "batch total"]
    log_probs: Float[Array, "batch response"]
    values: Float[Array, "batch response"]
    advantages: Float[Array, "batch response"]
    returns: Float[Array, "batch response"]

    @property
    def response_mask(self) -> Bool[Array, "batch response"]:
        """True at the response's tokens."""
        return self.mask[:, -self.log_probs.shape[1] :]

    def minibatches(self, number: int, key: PRNGKeyArray) -> Iterator["Experience"]:
        """The batch in a new order, cut into so many parts.

        Raises:
            ValueError: The parts would not be of equal size.
        """
        rows = self.tokens.shape[0]
        if number < 1 or rows % number:
            raise ValueError(f"number={number}: must be a divisor of the {rows} responses")
        for part in jax.random.permutation(key, rows).reshape(number, -1):
            yield jax.tree.map(lambda a, part=part: a[part], self)


def make_experience(
    drawn: Generated,
    reference_log_probs: Float[Array, "batch response"],
    values: Float[Array, "batch response"],
    scores: Float[Array, "batch"],
    *,
    stop_ids: Sequence[int] = (),
    config: PPOConfig = PPOConfig(),
) -> tuple[Experience, dict[str, Float[Array, ""]]]:
    """Rewards, advantages and returns of responses that were drawn and scored.

    Args:
        drawn: From :func:`effscale.generation.decode` with ``log_probs=True``.
        reference_log_probs: The reference's, see :func:`effscale.rlhf.response_log_probs`, at the temperature of the drawing.
        values: The critic's, see :func:`effscale.rlhf.response_values`.
        scores: Of whole responses: a reward model's or a function's.
        stop_ids: Tokens that end a response, as ``drawn`` had them; needed for ``missing_end_penalty`` and its metric.
        config: How rewards are made.

    Returns:
        The experience, and metrics: ``score`` (as given), ``kl`` (of a response, in nats), ``length``, ``ended`` (the share of responses that ended before they were
        cut off).

    Raises:
        ValueError: ``drawn`` has no log-probabilities.
    """
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
    reach = with_next(mask) if config.score_at == "next" else mask
    rewards = shaped_rewards(
        scores - config.missing_end_penalty * (~ended).astype(scores.dtype),
        kl,
        reach,
        kl_coef=config.kl_coef,
        clip=config.score_clip,
    )
    if config.whiten_rewards:
        rewards = whiten(rewards, reach, keep_mean=True)
    values = jnp.where(reach, values, 0.0)
    advantages, returns = gae(rewards, values, reach, gamma=config.gamma, lam=config.lam)
    if config.whiten_advantages:
        advantages = whiten(advantages, mask)
    experience = Experience(drawn.tokens, drawn.mask, drawn.log_probs, values, advantages, returns)
    number = lambda x: x.astype(jnp.float32).mean()
    metrics = {
        "score": scores.mean(),
        "kl": kl.sum(1).mean(),
        "length": number(drawn.num_new),
        "ended": number(ended),
    }
    return experience, metrics


def actor_loss(
    actor: Transformer,
    experience: Experience,
    key: PRNGKeyArray | None = None,
    *,
    config: PPOConfig = PPOConfig(),
    temperature: float = 1.0,
) -> Loss:
    """The loss of the policy, for :func:`effscale.training.make_train_step`.

    A mean over tokens is one over the whole batch, whatever it is cut into; DeepSpeed-Chat and TRL take one of each micro-batch.

    Args:
        actor: The policy, a causal model with a head named ``lm``.
        experience: A minibatch.
        key: Not used: dropout would make the ratio differ from 1 where nothing was learned yet.
        config: Clips and averages.
        temperature: That of the drawing.
    """
    del key
    mask = experience.response_mask
    said = response_log_probs(
        actor, experience.tokens, experience.mask, mask.shape[1], temperature=temperature
    )
    loss, metrics = policy_loss(
        said.log_probs, experience.log_probs, experience.advantages, mask, config.policy
    )
    tokens = mask.sum().astype(jnp.float32)
    entropy = jnp.where(mask, said.entropies, 0.0).sum() / jnp.maximum(tokens, 1.0)
    loss = loss - config.entropy_coef * entropy
    metrics = {**metrics, "entropy": jax.lax.stop_gradient(entropy)}
    rows = jnp.float32(mask.shape[0])
    weight = tokens if config.policy.average == "token" else rows
    sums = {name: weight * value for name, value in metrics.items()}
    return add_reports(Loss(weight * loss, weight, sums), said.reports)


def critic_loss(
    critic: Transformer,
    experience: Experience,
    key: PRNGKeyArray | None = None,
    *,
    config: PPOConfig = PPOConfig(),
) -> Loss:
    """The loss of the critic, for :func:`effscale.training.make_train_step`; arguments as in :func:`actor_loss`."""
    del key
    mask = experience.response_mask
    values = response_values(critic, experience.tokens, experience.mask, mask.shape[1])
    reach = with_next(mask) if config.score_at == "next" else mask
    loss, metrics = value_loss(
        values, experience.values, experience.returns, reach, clip=config.value_clip
    )
    weight = reach.sum().astype(jnp.float32)
    return Loss(weight * loss, weight, {name: weight * value for name, value in metrics.items()})
