"""The mean over workers, uncompressed and in one bit per number, and the bytes it sends."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from effscale.optim.params_like import unlike_params
from effscale.optim.workers import Workers, check_axis, check_local
from effscale.parallel.onebit.error_feedback import init_error_feedback
from effscale.parallel.onebit.mean import compressed_mean
from effscale.parallel.onebit.traffic import compressed_mean_bytes, mean_bytes
from effscale.parallel.worker_zeros import per_worker_zeros
from effscale.parallel.workers import PerWorker, SendsBytes, as_local, bound_axis_size


def mean(gradients: Any, axis_name: str | None) -> Any:
    """Return the mean over workers, uncompressed; on CPU in float32 at least."""
    if axis_name is None:
        return gradients

    def one(g: jax.Array) -> jax.Array:
        g = as_local(g, axis_name)
        if jnp.dtype(g.dtype).itemsize >= 4:
            return jax.lax.pmean(g, axis_name)
        # XLA's CPU compiler crashes on a reduction in a narrow type here, and widens it elsewhere.
        wide = lambda g: jax.lax.pmean(g.astype(jnp.float32), axis_name).astype(g.dtype)
        return jax.lax.platform_dependent(
            g, cpu=wide, default=lambda g: jax.lax.pmean(g, axis_name)
        )

    return jax.tree.map(one, gradients)


def init_errors(params: Any, workers: Workers | None) -> Any:
    """Return each worker's `ErrorFeedback` in a `PerWorker`; None for one worker."""
    if workers is None:
        return None
    make = lambda number: init_error_feedback(params, number, workers.specs)
    return unlike_params(
        params, lambda: per_worker_zeros(make, workers.axis_name, workers.num_workers)
    )


def compressed(tree: Any, errors: Any, workers: Workers) -> tuple[Any, Any]:
    """Call `compressed_mean` with the options of ``workers``."""
    scales = workers.scales or "tensor"
    return compressed_mean(tree, errors, workers.axis_name, scales=scales, specs=workers.specs)


def agree(
    tree: Any, errors: PerWorker | None, workers: Workers | None
) -> tuple[Any, PerWorker | None]:
    """Return the mean over workers in one bit per number, with the error feedback of `init_errors`; on one worker return the tree itself."""
    if workers is None or errors is None:
        return tree, None
    tree, new = compressed(tree, errors.value, workers)
    return tree, PerWorker(new, workers.axis_name)


def bytes_sent(gradients: Any, workers: Workers | None) -> tuple[jax.Array, jax.Array]:
    """Return the bytes that a device sends for the uncompressed mean and for the mean in one bit per number, in float32; zero for one worker."""
    number = None if workers is None else bound_axis_size(workers.axis_name)
    if workers is None or number is None or number == 1:
        return jnp.float32(0), jnp.float32(0)
    scales, specs = workers.scales or "tensor", workers.specs
    full = mean_bytes(gradients, number, specs=specs)
    one_bit = compressed_mean_bytes(gradients, number, scales=scales, specs=specs)
    return jnp.float32(full), jnp.float32(one_bit)


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
