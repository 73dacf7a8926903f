"""Transformations around any optimizer of workers: the uncompressed mean before it, and skipping steps that are not finite."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from effscale.optim.workers import (
    Workers,
    bytes_sent,
    check_axis,
    check_local,
    mean,
    mean_squared_norm,
)
from effscale.parallel.shared_values import settled
from effscale.parallel.workers import PerWorker, SendsBytes


@SendsBytes.register
class MeanOverWorkersState(NamedTuple):
    """The state of `mean_over_workers`.

    Attributes:
        sent: The bytes that each worker's device sent in the last update, by formula, float32.
        axis: An empty node that names the axis for ``effscale.parallel.worker_params``.
    """

    sent: Any
    axis: PerWorker


def mean_over_workers(axis_name: str) -> optax.GradientTransformationExtraArgs:
    """Average gradients over workers without compression: the first transformation of any optimizer in ``effscale.parallel.per_worker``.

    The gradients are sent in their own type; on CPU in float32 if their type is narrower.

    Args:
        axis_name: The mesh axis of the workers.

    Example:
        >>> adam = optax.chain(mean_over_workers("data"), optax.adam(1e-3))
    """
    check_axis(axis_name)

    def init(params: Any) -> Any:
        del params
        return MeanOverWorkersState(jnp.zeros((), jnp.float32), PerWorker((), axis_name))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del params, extra
        check_local(updates, axis_name)
        sent, _ = bytes_sent(updates, Workers(axis_name))
        return mean(updates, axis_name), MeanOverWorkersState(sent, state.axis)

    return optax.GradientTransformationExtraArgs(init, update)


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


def zeros_of_mean(x: Any) -> jax.Array:
    """Return zeros like an array, with a type that is the same on all workers."""
    sharding = jax.typeof(x).sharding  # for axes of type Explicit; empty for all others
    divided = any(entry is not None for entry in sharding.spec)
    return jnp.zeros(jnp.shape(x), x.dtype, device=sharding if divided else None)
