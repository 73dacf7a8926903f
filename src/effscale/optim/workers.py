"""The workers that an optimizer averages over: the errors they keep, their means in full and in one bit, and the bytes these send."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import optax

from effscale.optim.compressed_mean import compressed_mean, init_error_feedback
from effscale.optim.moments import in_float32, unlike_params
from effscale.optim.tensor_layout import Scales, compressed_mean_bytes, mean_bytes
from effscale.parallel.placement import shardings
from effscale.parallel.worker_steps import tracing_axis
from effscale.parallel.workers import PerWorker, as_local, bound_axis_size, differs, has_types
from effscale.training.clipping import Clip


@dataclasses.dataclass(frozen=True)
class Workers:
    """The workers that a 1-bit optimizer averages over, and how it compresses their mean.

    Attributes:
        axis_name: The mesh axis of the workers. Call the update within ``effscale.parallel.per_worker``. With an
            axis of one worker nothing is sent or compressed.
        num_workers: The number of workers. Required if no mesh defines the axis (``effscale.parallel.simulate_workers``).
        scales: One scale per ``tensor``, or one for the whole ``tree``. None uses the default of the optimizer: 1-bit LAMB has
            one for the tree, as in its paper, the others have one per tensor.
        specs: How the parameters are divided over the other mesh axes; see ``effscale.optim.compressed_mean``.

    Raises:
        ValueError: ``axis_name`` is not the name of a single axis, or ``scales`` is unknown.

    Example:
        >>> from effscale.optim import onebit_adam
        >>> optimizer = onebit_adam(1e-3, freeze_step=1000, workers=Workers("data"))
    """

    axis_name: str
    _: dataclasses.KW_ONLY
    num_workers: int | None = None
    scales: Scales | None = None
    specs: Any = None

    def __post_init__(self):
        check_axis(self.axis_name)
        if self.scales is not None and self.scales not in get_args(Scales):
            raise ValueError(
                f"scales must be one of {', '.join(get_args(Scales))}, got {self.scales!r}"
            )


def axis_of(workers: Workers | None) -> str | None:
    """Return the workers' axis; None for one worker.

    Raises:
        ValueError: ``workers`` is not a `Workers`, for instance the name of the axis.
    """
    if workers is not None and not isinstance(workers, Workers):
        axis = workers if isinstance(workers, str) else "data"
        raise ValueError(
            f"workers must be a Workers or None, got {workers!r}. Use workers=Workers({axis!r})."
        )
    return None if workers is None else workers.axis_name


def with_scales(workers: Workers | None, scales: Scales) -> Workers | None:
    """Return the workers, with these scales if they were not set."""
    axis_of(workers)  # refuses what is not a Workers
    if workers is None or workers.scales is not None:
        return workers
    return dataclasses.replace(workers, scales=scales)


def check_axis(axis_name: Any) -> None:
    """Raise a ``ValueError`` unless this is the name of a single axis."""
    if not isinstance(axis_name, str):
        raise ValueError(
            f"axis_name must be the name of one mesh axis, got {axis_name!r}. The compiler averages over all other axes, uncompressed; "
            "to compress over several axes, combine them into one mesh axis."
        )


def check_local(gradients: Any, axis_name: str | None) -> None:
    """Raise an error if gradients are known to be the same on all workers, or if the axis is not bound."""
    if axis_name is None:
        return
    if bound_axis_size(axis_name) is None:
        raise ValueError(
            f"axis_name={axis_name!r} is not bound here. Wrap the training step in per_worker(step, {axis_name!r}), or "
            "create the optimizer without workers= to train on one."
        )
    leaves = jax.tree.leaves(gradients)
    if leaves and has_types(axis_name) and not any(differs(g, axis_name) for g in leaves):
        raise ValueError(
            f"the gradients are the same on all workers along {axis_name!r}, so they were already summed and there is "
            "nothing to compress. Differentiate at worker_params(params, opt_state), and do not average yourself. (Instead "
            "of optax.MultiSteps use make_train_step(accumulate=).)"
        )


def refusing_left_out_workers(
    optimizer: optax.GradientTransformationExtraArgs, workers: Workers | None
) -> optax.GradientTransformationExtraArgs:
    """Make an optimizer without workers raise an error in a step of ``per_worker``, where it would compress nothing.

    The transformations that it is made of do not: a step may average in another way first.
    """
    if workers is not None:
        return optimizer

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        if (axis_name := tracing_axis()) is not None:
            raise ValueError(
                f"workers must be set in a step on the workers along {axis_name!r}, got None, with which nothing is compressed. "
                f"Use workers=Workers({axis_name!r})."
            )
        return optimizer.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def per_worker_zeros(
    make: Callable[[int], Any], axis_name: str, num_workers: int | None = None
) -> PerWorker:
    """Return zeros for each worker, whether the axis is bound (``jax.shard_map``, ``jax.vmap``) or not.

    Args:
        make: Maps the number of workers to one worker's zeros.
        axis_name: The workers' axis.
        num_workers: Number of workers. Required if neither a bound axis nor the current mesh (``jax.set_mesh``) defines it.

    Raises:
        ValueError: The number of workers is unknown, or two values differ.
    """
    bound, mesh = bound_axis_size(axis_name), jax.sharding.get_abstract_mesh()
    of_mesh = None if mesh.empty else mesh.shape.get(axis_name)
    known = next((n for n in (bound, of_mesh, num_workers) if n is not None), None)
    if known is None:
        raise ValueError(
            f"axis_name={axis_name!r} is not an axis of the current mesh. Enter jax.set_mesh(mesh) around the optimizer's "
            "init, or pass num_workers"
        )
    if num_workers is not None and num_workers != known:
        raise ValueError(
            f"num_workers must be the size {known} of the axis {axis_name!r}, got {num_workers}"
        )
    if bound is not None:
        return PerWorker(make(known), axis_name)

    def all_workers() -> Any:
        zeros = lambda x: jnp.zeros((known, *x.shape), x.dtype)
        return jax.tree.map(zeros, jax.eval_shape(functools.partial(make, known)))

    if of_mesh is None:
        return PerWorker(all_workers(), axis_name)
    # Sharded from the start, because one device may not have room for what all workers keep.
    places = shardings(PerWorker(jax.eval_shape(all_workers), axis_name), mesh)
    specs = jax.tree.map(lambda place: place.spec, places.value)
    return PerWorker(jax.jit(all_workers, out_shardings=specs)(), axis_name)


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


def mean_squared_norm(gradients: Any, axis_name: str | None) -> jax.Array:
    """Return the mean over workers of the sum of squares, in float32: finite only if all gradients of all workers are finite."""
    square = _squared_norm(gradients)
    return square if axis_name is None else jax.lax.pmean(as_local(square, axis_name), axis_name)


def clipped_locally(gradients: Any, axis_name: str | None, clip: Clip | None) -> Any:
    """Clip the gradient of each worker by the norm that ``clip.by`` selects."""
    return _clipped(gradients, gradients, axis_name, clip)


def clipped_mean(gradients: Any, axis_name: str | None, clip: Clip | None) -> Any:
    """Return the mean over workers, uncompressed, in float32 at least, clipped by the norm that ``clip.by`` selects."""
    return _clipped(in_float32(mean(gradients, axis_name)), gradients, axis_name, clip)


def _clipped(tree: Any, gradients: Any, axis_name: str | None, clip: Clip | None) -> Any:
    """Clip a tree by the norms of the workers' gradients, or by its own."""
    if clip is None:
        return tree
    by_all = clip.by == "synchronized"
    squared = mean_squared_norm(gradients, axis_name) if by_all else _squared_norm(tree)
    factor = clip.factor(jnp.sqrt(squared))
    return jax.tree.map(lambda g: (g.astype(jnp.float32) * factor).astype(g.dtype), tree)


def _squared_norm(tree: Any) -> jax.Array:
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return sum(squares, start=jnp.zeros((), jnp.float32))
