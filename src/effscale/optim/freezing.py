"""The end of the warmup of a 1-bit optimizer: after a number of steps, or when the variance has settled."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effscale.optim.moments import check_count
from effscale.parallel.workers import SendsBytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class VarianceRatio:
    r"""A criterion that ends the warmup when $\lVert v_{t-D} \rVert_1 / \lVert v_t \rVert_1$ reaches a threshold.

    DeepSpeed never implemented this criterion.

    References:
        Tang et al., "1-bit Adam" (2021). https://arxiv.org/abs/2102.02888

    >>> VarianceRatio(window=100, start=500).threshold
    0.96
    """

    threshold: float = 0.96
    """The ratio that ends the warmup."""
    window: int = 1000
    """The distance D of the two variances, in steps; the paper uses 1 / (1 - b2)."""
    start: int = 0
    """The step before which the ratio is ignored, usually the end of the learning-rate warmup."""

    def __post_init__(self):
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {self.threshold}")
        if self.window < 1:
            raise ValueError(
                f"window must be at least 1, got {self.window}. A common value is 1 / (1 - b2)."
            )
        if self.start < 0:
            raise ValueError(f"start must not be negative, got {self.start}")


class RatioState(NamedTuple):
    """The last ``window`` L1 norms of the variance, as a ring, and whether the ratio was reached."""

    norms: jax.Array
    reached: jax.Array


def init_ratio(criterion: VarianceRatio | None) -> RatioState | None:
    """Return the state before the first step."""
    if criterion is None:
        return None
    return RatioState(jnp.zeros((criterion.window,), jnp.float32), jnp.zeros((), jnp.bool_))


def watch_variance(
    criterion: VarianceRatio | None, state: RatioState | None, count: jax.Array, nu: Any
) -> RatioState | None:
    """Record the variance after the warmup step number ``count`` + 1."""
    if criterion is None or state is None:
        return state
    norms = [jnp.sum(jnp.abs(v), dtype=jnp.float32) for v in jax.tree.leaves(nu)]
    norm = sum(norms, start=jnp.zeros((), jnp.float32))
    place = count % criterion.window
    # A variance of zero, before any gradient, has not settled.
    seen = (count >= criterion.window) & (count >= criterion.start) & (norm > 0)
    reached = seen & (state.norms[place] >= criterion.threshold * norm)
    return RatioState(state.norms.at[place].set(norm), state.reached | reached)


def is_frozen(freeze_step: Any, state: RatioState | None, count: jax.Array) -> jax.Array:
    """Return whether the step number ``count`` + 1 is past the warmup."""
    frozen = count >= freeze_step
    return frozen if state is None else frozen | state.reached


def check_freeze_step(freeze_step: Any) -> None:
    """Raise a ``ValueError`` for an invalid number of warmup steps."""
    why = ", as the variance must be learned before it is frozen (15 to 25% of the steps are usual)"
    check_count("freeze_step", freeze_step, 1, why)


def params_without_variance(opt_state: Any) -> Float[Array, ""]:
    """Count the parameters with a variance of zero, which have not had a gradient yet.

    Once the variance is frozen, such a parameter never moves again, whatever its gradient. Examples are the rows of an
    embedding for tokens that did not occur in the warmup. During the warmup, the count is the number of parameters that
    would never move if it ended now. It should be near zero before the warmup ends. If it is not, freeze later, or use
    another optimizer for these parameters.

    Args:
        opt_state: A state that contains those of `onebit_adam`, `onebit_lamb` or `zero_one_adam`. It may be sharded, and
            the function may be called under ``jax.jit``.

    Returns:
        The number of elements, in float32.

    Example:
        >>> from effscale.optim import onebit_adam
        >>> optimizer, params = onebit_adam(1e-3), {"embedding": jnp.ones((3, 4))}
        >>> gradients = {"embedding": jnp.zeros((3, 4)).at[:2].set(1.0)}  # the last token has not come up
        >>> _, state = optimizer.update(gradients, optimizer.init(params), params)
        >>> print(params_without_variance(state))
        4.0
    """
    # An optimizer that sends bytes and has a variance freezes it.
    freezes = lambda node: isinstance(node, SendsBytes) and hasattr(node, "nu")
    states = [s for s in jax.tree.leaves(opt_state, is_leaf=freezes) if freezes(s)]
    zeros = [jnp.sum(v == 0, dtype=jnp.float32) for s in states for v in jax.tree.leaves(s.nu)]
    return sum(zeros, start=jnp.zeros((), jnp.float32))
