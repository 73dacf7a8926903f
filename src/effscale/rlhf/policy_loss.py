"""Losses of PPO and its critic-free variants: clipped policy loss, clipped value loss, and averaging over tokens."""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from effscale.options import Bounds, Options, PositiveFloat, checked
from effscale.rlhf.rewards import bounded_exp

Average = Literal["token", "sequence", "fixed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyLossConfig(Options):
    """Options of the policy loss, which keep the policy close to the one that generated the responses."""

    clip_low: Annotated[float, Bounds(above=0, at_most=1)] = 0.2
    """Lower clip of the ratio of new to old probability: 1 minus this."""
    clip_high: PositiveFloat = 0.2
    """Upper clip of the ratio of new to old probability: 1 plus this. DAPO uses 0.28."""
    dual_clip: Annotated[float, Bounds(above=1)] | None = None
    """Upper bound of the ratio where the advantage is negative; above 1, or None for no bound."""
    ratio_of: Literal["token", "sequence"] = "token"
    """One ratio per token, or one per response: the geometric mean over its tokens (GSPO)."""
    average: Average = "token"
    """How to average over tokens: ``token``, ``sequence`` or ``fixed``; see ``masked_average``."""


def check_shapes(first: Float[Array, "batch response"], **others: Array) -> None:
    """Raise a ValueError unless all arrays have the shape of the first: they would be broadcast along the wrong axis."""
    for name, array in others.items():
        if array.shape != first.shape:
            raise ValueError(
                f"{name} must have one value for each token, of shape {first.shape}, got the shape {array.shape}. Repeat a value per response over its tokens"
            )


def masked_average(
    x: Float[Array, "batch response"],
    mask: Bool[Array, "batch response"],
    average: Average = "token",
) -> Float[Array, ""]:
    """Average over the tokens of a batch of responses.

    Args:
        x: A value for each token.
        mask: True at the tokens that count.
        average: ``token``: all tokens have the same weight. ``sequence``: the mean of each response's mean, so that
            tokens of short responses count more. ``fixed``: the sum over each response divided by the maximum length,
            whatever its own length (Dr. GRPO).

    Example:
        >>> import jax.numpy as jnp
        >>> x, mask = jnp.array([[1.0, 1.0], [4.0, 0.0]]), jnp.array([[True, True], [True, False]])
        >>> [float(masked_average(x, mask, how)) for how in ("token", "sequence", "fixed")]
        [2.0, 2.5, 1.5]
    """
    sums = jnp.where(mask, x, 0.0).sum(1)
    counts = mask.sum(1).astype(x.dtype)
    if average == "token":
        return sums.sum() / jnp.maximum(counts.sum(), 1.0)
    if average == "sequence":
        any_token = (counts > 0).astype(x.dtype)
        return (sums / jnp.maximum(counts, 1.0)).sum() / jnp.maximum(any_token.sum(), 1.0)
    if average == "fixed":
        return (sums / x.shape[1]).mean()
    raise ValueError(f"average must be 'token', 'sequence' or 'fixed', got {average!r}")


def policy_loss(
    log_probs: Float[Array, "batch response"],
    old_log_probs: Float[Array, "batch response"],
    advantages: Float[Array, "batch response"],
    mask: Bool[Array, "batch response"],
    config: PolicyLossConfig = PolicyLossConfig(),
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    r"""Compute the clipped policy loss of PPO.

    $$L = \mathrm{mean}_t \max(-A_t \rho_t,\; -A_t\, \mathrm{clip}(\rho_t, 1 - \epsilon_{low}, 1 + \epsilon_{high})), \qquad
        \rho_t = \pi(a_t) / \pi_{old}(a_t)$$

    Args:
        log_probs: Log-probabilities of the generated tokens under the policy being trained.
        old_log_probs: Log-probabilities under the policy that generated them.
        advantages: Advantage of each token; no gradient flows through them. For one value per response, repeat it
            over its tokens.
        mask: True at the response's tokens.
        config: Clipping and averaging.

    Returns:
        The loss, and metrics: ``ratio``, the mean ratio (exactly 1 on the first minibatch); ``clip_fraction``, the
        share of tokens that are clipped; ``approx_kl``, the mean k3 estimate of the divergence from the old policy.

    References:
        Schulman et al., "Proximal Policy Optimization Algorithms" (2017), equation 7.
            https://arxiv.org/abs/1707.06347
        Ye et al., "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning" (2020), for
            ``dual_clip``. https://arxiv.org/abs/1912.09729
        Zheng et al., "Group Sequence Policy Optimization" (2025), for ``ratio_of="sequence"``.
            https://arxiv.org/abs/2507.18071

    Example:
        >>> import jax.numpy as jnp
        >>> one, mask = jnp.ones((1, 2)), jnp.array([[True, True]])
        >>> loss, metrics = policy_loss(-one, -one, 2.0 * one, mask)
        >>> float(loss), float(metrics["ratio"])
        (-2.0, 1.0)
    """
    check_shapes(log_probs, old_log_probs=old_log_probs, advantages=advantages, mask=mask)
    advantages = jax.lax.stop_gradient(advantages)
    log_ratio = jnp.where(mask, log_probs - jax.lax.stop_gradient(old_log_probs), 0.0)
    if config.ratio_of == "sequence":
        length = jnp.maximum(mask.sum(1, keepdims=True), 1).astype(log_ratio.dtype)
        log_ratio = jnp.broadcast_to(log_ratio.sum(1, keepdims=True) / length, log_ratio.shape)
    ratio = bounded_exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high)
    plain, bounded = -advantages * ratio, -advantages * clipped
    losses = jnp.maximum(plain, bounded)
    if config.dual_clip is not None:
        most = -advantages * config.dual_clip
        losses = jnp.where(advantages < 0, jnp.minimum(losses, most), losses)
    mean = lambda x: masked_average(jax.lax.stop_gradient(x), mask)
    metrics = {
        "ratio": mean(ratio),
        "clip_fraction": mean((bounded > plain).astype(ratio.dtype)),
        "approx_kl": mean(ratio - 1.0 - log_ratio),
    }
    return masked_average(losses, mask, config.average), metrics


def value_loss(
    values: Float[Array, "batch response"],
    old_values: Float[Array, "batch response"],
    returns: Float[Array, "batch response"],
    mask: Bool[Array, "batch response"],
    *,
    clip: float | None = 0.2,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    r"""Compute half the mean squared error of a critic whose values are clipped to stay near the old ones.

    $$L = \tfrac12\, \mathrm{mean}_t \max((V_t - R_t)^2,\; (\mathrm{clip}(V_t, V^{old}_t \pm \epsilon) - R_t)^2)$$

    Args:
        values: The critic's current values.
        old_values: The critic's values when the responses were scored.
        returns: The targets, see ``effscale.rlhf.gae``.
        mask: True at the tokens that count.
        clip: How far a value can move in one batch of responses; None means no bound.

    Returns:
        The loss, and metrics: ``value_clip_fraction``; ``explained_variance``, 1 minus the variance of the old
        values' errors divided by that of the returns.

    Example:
        >>> import jax.numpy as jnp
        >>> one, mask = jnp.ones((1, 1)), jnp.array([[True]])
        >>> loss, _ = value_loss(3.0 * one, one, 4.0 * one, mask)  # 3 is clipped to 1.2, with an error of 2.8
        >>> print(f"{loss:.2f}")
        3.92
    """
    check_shapes(values, old_values=old_values, returns=returns, mask=mask)
    clip = checked("clip", clip, PositiveFloat | None)
    returns, old_values = jax.lax.stop_gradient((returns, old_values))
    plain = bounded = jnp.square(values - returns)
    if clip is not None:
        near = jnp.clip(values, old_values - clip, old_values + clip)
        bounded = jnp.square(near - returns)
    mean = lambda x: masked_average(jax.lax.stop_gradient(x), mask)
    variance = lambda x: mean(jnp.square(x - mean(x)))
    metrics = {
        "value_clip_fraction": mean((bounded > plain).astype(values.dtype)),
        "explained_variance": 1.0 - variance(returns - old_values) / (variance(returns) + 1e-8),
    }
    return 0.5 * masked_average(jnp.maximum(plain, bounded), mask), metrics
