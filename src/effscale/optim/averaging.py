"""The mean over workers, in full and in one bit per number, and what it sends."""

from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from effscale.optim.params_like import unlike_params
from effscale.parallel.onebit.error_feedback import init_error_feedback
from effscale.parallel.onebit.exchange import Scales
from effscale.parallel.onebit.mean import compressed_mean
from effscale.parallel.onebit.traffic import compressed_mean_bytes, mean_bytes
from effscale.parallel.worker_zeros import per_worker_zeros
from effscale.parallel.workers import (
    PerWorker,
    as_local,
    bound_axis_size,
    differs,
    has_types,
)


def check_local(gradients: Any, axis_name: str | None) -> None:
    """Raise if gradients are known to be the same on all workers, or if the axis is not bound."""
    if axis_name is None:
        return
    if bound_axis_size(axis_name) is None:
        raise ValueError(
            f"axis_name={axis_name!r} is not bound here: take the step within per_worker(step, {axis_name!r}), or leave "
            "axis_name out to train on one worker"
        )
    leaves = jax.tree.leaves(gradients)
    if leaves and has_types(axis_name) and not any(differs(g, axis_name) for g in leaves):
        raise ValueError(
            f"the gradients are the same on all workers along {axis_name!r}, so they were summed already and there is "
            "nothing to compress: differentiate at worker_params(params, opt_state), and do not average yourself. (Instead "
            "of optax.MultiSteps use make_train_step(accumulate=).)"
        )


def mean(gradients: Any, axis_name: str | None) -> Any:
    """The mean over workers, uncompressed; on CPU in float32 at least."""
    if axis_name is None:
        return gradients

    def one(g: jax.Array) -> jax.Array:
        g = as_local(g, axis_name)
        if jnp.dtype(g.dtype).itemsize >= 4:
            return jax.lax.pmean(g, axis_name)
        # XLA's CPU compiler dies of a reduction in a narrow type here, and widens it elsewhere.
        wide = lambda g: jax.lax.pmean(g.astype(jnp.float32), axis_name).astype(g.dtype)
        return jax.lax.platform_dependent(
            g, cpu=wide, default=lambda g: jax.lax.pmean(g, axis_name)
        )

    return jax.tree.map(one, gradients)


def init_errors(params: Any, axis_name: str | None, num_workers: int | None, specs: Any) -> Any:
    """Each worker's `ErrorFeedback`, in a `PerWorker`; None on one worker."""
    if axis_name is None:
        return None
    make = lambda workers: init_error_feedback(params, workers, specs)
    return unlike_params(params, lambda: per_worker_zeros(make, axis_name, num_workers))


def agree(
    tree: Any, errors: PerWorker | None, *, scales: Scales, specs: Any
) -> tuple[Any, PerWorker | None]:
    """The mean over workers in one bit per number; the tree itself on one worker."""
    if errors is None:
        return tree, None
    axis_name = errors.axis_name
    tree, new = compressed_mean(tree, errors.value, axis_name, scales=scales, specs=specs)
    return tree, PerWorker(new, axis_name)


def bytes_sent(
    gradients: Any, axis_name: str | None, scales: Scales, specs: Any
) -> tuple[float, float]:
    """Bytes that a device sends for the mean in full and in one bit per number; nothing where there is one worker."""
    workers = 1 if axis_name is None else bound_axis_size(axis_name)
    if workers is None or workers == 1:
        return 0.0, 0.0
    full = mean_bytes(gradients, workers, specs=specs)
    return full, compressed_mean_bytes(gradients, workers, scales=scales, specs=specs)


class MeanOverWorkersState(NamedTuple):
    """State of `mean_over_workers`.

    Attributes:
        sent: float32, bytes that each worker's device sent in the last update, by formula.
        axis: Nothing; it tells `effscale.parallel.worker_params` the axis.
    """

    sent: Any
    axis: PerWorker


def check_axis(axis_name: Any) -> None:
    """Raise a ``ValueError`` unless the workers lie along one named axis, or there is one worker."""
    if axis_name is not None and not isinstance(axis_name, str):
        raise ValueError(
            f"axis_name={axis_name!r} must be the name of one mesh axis. The compiler averages over all other axes, in full; "
            "to compress over several, give the mesh one axis of their product"
        )


def check_workers(axis_name: str | None, num_workers: int | None, scales: str) -> None:
    """Raise a ``ValueError`` for options of the exchange that do not go together."""
    check_axis(axis_name)
    if axis_name is None and num_workers is not None:
        raise ValueError(
            f"num_workers={num_workers} without axis_name: name the workers' axis, or leave num_workers out"
        )
    if scales not in get_args(Scales):
        raise ValueError(f"scales={scales!r} is unknown; one of {', '.join(get_args(Scales))}")


def mean_over_workers(axis_name: str) -> optax.GradientTransformationExtraArgs:
    """The uncompressed mean over workers, as the first link of any optimizer within `effscale.parallel.per_worker`.

    What crosses the network is of the gradients' type; on CPU it is float32 where that type is narrower.

    >>> adam = optax.chain(mean_over_workers("data"), optax.adam(1e-3))
    """
    check_axis(axis_name)

    def init(params: Any) -> Any:
        del params
        return MeanOverWorkersState(jnp.zeros((), jnp.float32), PerWorker((), axis_name))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del params, extra
        check_local(updates, axis_name)
        sent, _ = bytes_sent(updates, axis_name, "tensor", None)
        return mean(updates, axis_name), MeanOverWorkersState(jnp.float32(sent), state.axis)

    return optax.GradientTransformationExtraArgs(init, update)
