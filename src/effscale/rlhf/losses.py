"""Losses of the policy and the critic on experience, for ``effscale.training.make_train_step``."""

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from effscale.models import Transformer
from effscale.rlhf.config import GroupConfig, LearningConfig, PPOConfig
from effscale.rlhf.experience import Experience
from effscale.rlhf.policy_loss import masked_average, policy_loss, value_loss
from effscale.rlhf.rewards import kl_estimate, with_next
from effscale.rlhf.scoring import response_log_probs, values_and_reports
from effscale.training import Loss, add_reports, next_token_loss


def actor_loss(
    actor: Transformer,
    experience: Experience,
    key: PRNGKeyArray | None = None,
    *,
    config: LearningConfig = PPOConfig(),
    temperature: float = 1.0,
) -> Loss:
    r"""Compute the clipped loss of the policy, plus the terms for divergence, entropy and ordinary text if the config has them in the loss.

    $$L = L_{policy} + \beta\,\mathrm{KL} - c_H H + c_{text} L_{text}$$

    A mean over tokens is taken over the whole batch, however it is split; DeepSpeed-Chat and TRL take it per
    micro-batch.

    Args:
        actor: The policy, a causal model with a head named ``lm``.
        experience: A minibatch.
        key: Not used: with dropout, the ratio would differ from 1 before the first update.
        config: Clipping, averaging and coefficients: a ``PPOConfig`` or a ``GroupConfig``.
        temperature: The sampling temperature.

    Raises:
        ValueError: ``pretraining_coef`` is set and the experience has no text.
    """
    del key
    mask = experience.learned
    said = response_log_probs(
        actor, experience.tokens, experience.mask, mask.shape[1], temperature=temperature
    )
    average = config.policy.average
    loss, metrics = policy_loss(
        said.log_probs, experience.log_probs, experience.advantages, mask, config.policy
    )
    entropy = masked_average(said.entropies, mask, "token")
    if config.entropy_coef:
        loss = loss - config.entropy_coef * entropy
    metrics = {**metrics, "entropy": jax.lax.stop_gradient(entropy)}
    if isinstance(config, GroupConfig) and config.kl_in == "loss":
        reference = experience.reference_log_probs
        assert reference is not None, "make_group_experience sets it"
        kl = kl_estimate(said.log_probs, reference, config.kl_estimator)
        loss = loss + config.kl_coef * masked_average(kl, mask, average)
    if config.pretraining_coef:
        if experience.text is None:
            raise ValueError(
                f"pretraining_coef={config.pretraining_coef} needs rows of text. Pass batches with 'text' to the step"
            )
        text = next_token_loss(actor, experience.text).mean()
        loss = loss + config.pretraining_coef * text
        metrics["text_loss"] = jax.lax.stop_gradient(text)
    weight = jnp.float32(mask.shape[0])
    if average == "token":
        weight = mask.sum().astype(jnp.float32)
    sums = {name: weight * value for name, value in metrics.items()}
    return add_reports(Loss(weight * loss, weight, sums), said.reports)


def critic_loss(
    critic: Transformer,
    experience: Experience,
    key: PRNGKeyArray | None = None,
    *,
    config: PPOConfig = PPOConfig(),
    head: str = "value",
) -> Loss:
    """Compute the loss of the critic.

    Args:
        critic: A causal model with a head of one class and ``pool="none"``.
        experience: A minibatch.
        key: Not used, as in ``actor_loss``.
        config: Clipping, and where the score is applied.
        head: Name of the head.
    """
    del key
    mask = experience.learned
    assert experience.values is not None
    assert experience.returns is not None
    values, reports = values_and_reports(
        critic, experience.tokens, experience.mask, mask.shape[1], head=head
    )
    reach = with_next(mask) if config.score_at == "next" else mask
    loss, metrics = value_loss(
        values, experience.values, experience.returns, reach, clip=config.value_clip
    )
    weight = reach.sum().astype(jnp.float32)
    sums = {name: weight * value for name, value in metrics.items()}
    return add_reports(Loss(weight * loss, weight, sums), reports)
