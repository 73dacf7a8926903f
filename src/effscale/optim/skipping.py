"""Skip steps with a gradient that is not finite, on all workers."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from effscale.optim.clipping import mean_squared_norm
from effscale.optim.precision import zeros_of_mean
from effscale.optim.workers import check_axis, check_local
from effscale.parallel.shared_values import settled


class SkipNonfiniteState(NamedTuple):
    """The state of `skip_nonfinite`: the number of skipped updates (int32) and the inner state."""

    skipped: jax.Array
    inner: Any


def skip_nonfinite(
    inner: optax.GradientTransformation, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Skip the update, on all workers, if any gradient of any worker is not finite.

    Updates are then zero and the inner state (moments, counters, errors) stays bit for bit as it was. The decision
    costs one number per worker on the network. Gradients so large that their squares overflow float32 count as not finite.

    Args:
        inner: Any optax transformation.
        axis_name: The workers' axis; None for one worker.

    Example:
        >>> optimizer = skip_nonfinite(optax.sgd(0.1))
        >>> updates, state = optimizer.update(jnp.array([1.0, jnp.nan]), optimizer.init(jnp.zeros(2)))
        >>> updates.tolist(), int(state.skipped)
        ([0.0, 0.0], 1)
    """
    if axis_name is not None:
        check_axis(axis_name)
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        return SkipNonfiniteState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        check_local(updates, axis_name)
        finite = jnp.isfinite(mean_squared_norm(updates, axis_name))

        def take() -> Any:
            step = settled(functools.partial(inner.update, **extra), axis_name)
            return step(updates, state.inner, params)

        def skip() -> Any:
            return jax.tree.map(zeros_of_mean, updates), state.inner

        new_updates, new_inner = jax.lax.cond(finite, take, skip)
        skipped = state.skipped + (~finite).astype(jnp.int32)
        return new_updates, SkipNonfiniteState(skipped, new_inner)

    return optax.GradientTransformationExtraArgs(init, update)
