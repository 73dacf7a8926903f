"""Advantages: how much better each token was than expected, from a critic (GAE) or from other responses to the same prompt (GRPO, RLOO)."""

from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from effscale.options import Bounds, Fraction, checked


def gae(
    rewards: Float[Array, "batch response"],
    values: Float[Array, "batch response"],
    mask: Bool[Array, "batch response"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Array, "batch response"], Float[Array, "batch response"]]:
    r"""Compute advantages by generalized advantage estimation, and the returns that a critic learns.

    $$
    \delta_t = r_t + \gamma V_{t+1} - V_t, \qquad A_t = \delta_t + \gamma \lambda A_{t+1}, \qquad R_t = A_t + V_t
    $$

    After the last token of a response the value is 0, even if the response was cut off.

    Args:
        rewards: The reward of each token, see ``effscale.rlhf.shaped_rewards``.
        values: The critic's prediction before each token.
        mask: True at the response's tokens; elsewhere both results are 0.
        gamma: Discount factor.
        lam: 1 uses the rest of the response; 0 uses only the next value.

    Returns:
        Advantages and returns.

    References:
        Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation" (2016), equation
            16. https://arxiv.org/abs/1506.02438

    Example:
        >>> import jax.numpy as jnp
        >>> mask = jnp.array([[True, True]])
        >>> advantages, returns = gae(jnp.array([[0.0, 1.0]]), jnp.array([[0.5, 0.5]]), mask, lam=1.0)
        >>> advantages.tolist(), returns.tolist()
        ([[0.5, 0.5]], [[1.0, 1.0]])
    """
    gamma, lam = checked("gamma", gamma, Fraction), checked("lam", lam, Fraction)
    rewards, values = jnp.where(mask, rewards, 0.0), jnp.where(mask, values, 0.0)
    following = jnp.pad(values, ((0, 0), (0, 1)))[:, 1:]
    deltas = rewards + gamma * following - values

    def back(later: Array, delta: Array) -> tuple[Array, Array]:
        advantage = delta + gamma * lam * later
        return advantage, advantage

    _, advantages = jax.lax.scan(back, jnp.zeros_like(deltas[:, 0]), deltas.T, reverse=True)
    advantages = jnp.where(mask, advantages.T, 0.0)
    return advantages, advantages + values


def whiten(
    x: Float[Array, "batch response"],
    mask: Bool[Array, "batch response"],
    *,
    keep_mean: bool = False,
) -> Float[Array, "batch response"]:
    """Normalize to mean 0 and variance 1 over all tokens of the batch; 0 outside the mask.

    Args:
        x: Advantages or rewards.
        mask: True at the tokens that count.
        keep_mean: Normalize only the variance, as is usual for rewards.

    Example:
        >>> import jax.numpy as jnp
        >>> print(whiten(jnp.array([[1.0, 3.0, 9.0]]), jnp.array([[True, True, False]])).round(2))
        [[-0.71  0.71  0.  ]]
    """
    count = jnp.maximum(mask.sum(), 1).astype(x.dtype)
    mean = jnp.where(mask, x, 0.0).sum() / count
    # Bessel's correction; a single value has no variance.
    squares = jnp.where(mask, jnp.square(x - mean), 0.0).sum()
    variance = squares / jnp.maximum(count - 1.0, 1.0)
    white = (x - mean) * jax.lax.rsqrt(variance + 1e-8)
    return jnp.where(mask, white + mean if keep_mean else white, 0.0)


def group_advantages(
    scores: Float[Array, "batch"], group_size: int, *, scale: bool = True
) -> Float[Array, "batch"]:
    r"""Compute the advantage of each response over the others for its prompt, as in GRPO: $(s_i - \bar s) / (\sigma + 10^{-4})$.

    Args:
        scores: Scores of responses; responses to the same prompt are adjacent.
        group_size: Number of responses per prompt.
        scale: Divide by the group's standard deviation. If False (Dr. GRPO), prompts whose scores vary little do not
            count more than others.

    Raises:
        ValueError: The group size does not divide the batch, or is below 2.

    References:
        Shao et al., "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models" (2024),
            section 4.1. https://arxiv.org/abs/2402.03300
        Liu et al., "Understanding R1-Zero-Like Training: A Critical Perspective" (2025).
            https://arxiv.org/abs/2503.20783

    Example:
        >>> import jax.numpy as jnp
        >>> group_advantages(jnp.array([1.0, 3.0, 5.0, 5.0]), 2, scale=False).tolist()
        [-1.0, 1.0, 0.0, 0.0]
    """
    groups = _groups(scores, group_size)
    advantages = groups - groups.mean(1, keepdims=True)
    if scale:
        advantages = advantages / (groups.std(1, keepdims=True, ddof=1) + 1e-4)
    return advantages.reshape(-1)


def leave_one_out_advantages(
    scores: Float[Array, "batch"], group_size: int
) -> Float[Array, "batch"]:
    """Compute the score of each response minus the mean of the *other* responses to its prompt, as in RLOO.

    Args:
        scores: Scores of responses; responses to the same prompt are adjacent.
        group_size: Number of responses per prompt.

    Raises:
        ValueError: The group size does not divide the batch, or is below 2.

    References:
        Ahmadian et al., "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in
            LLMs" (2024), equation 6. https://arxiv.org/abs/2402.14740

    Example:
        >>> import jax.numpy as jnp
        >>> leave_one_out_advantages(jnp.array([1.0, 2.0, 6.0]), 3).tolist()
        [-3.0, -1.5, 4.5]
    """
    groups = _groups(scores, group_size)
    others = (groups.sum(1, keepdims=True) - groups) / (group_size - 1)
    return (groups - others).reshape(-1)


def _groups(scores: Array, group_size: int) -> Float[Array, "groups group_size"]:
    group_size = checked("group_size", group_size, Annotated[int, Bounds(at_least=2)])
    if scores.shape[0] % group_size:
        raise ValueError(
            f"group_size must divide the number of responses, {scores.shape[0]}, got {group_size}"
        )
    return scores.reshape(-1, group_size)
