"""Diagnostics of the 1-bit optimizers."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effscale.optim.onebit_adam import OneBitAdamState
from effscale.optim.onebit_lamb import OneBitLambState
from effscale.optim.zero_one.adam import ZeroOneAdamState

_FREEZING = (OneBitAdamState, OneBitLambState, ZeroOneAdamState)


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
    is_state = lambda node: isinstance(node, _FREEZING)
    states = [s for s in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(s)]
    zeros = [jnp.sum(v == 0, dtype=jnp.float32) for s in states for v in jax.tree.leaves(s.nu)]
    return sum(zeros, start=jnp.zeros((), jnp.float32))
