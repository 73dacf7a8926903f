"""Initial values of what each worker keeps for itself."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effscale.parallel.placement import shardings
from effscale.parallel.workers import PerWorker, bound_axis_size


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
    known = bound
    if known is None:
        known = None if mesh.empty else mesh.shape.get(axis_name)
    if known is None:
        known = num_workers
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

    if mesh.empty or axis_name not in mesh.shape:
        return PerWorker(all_workers(), axis_name)
    # Sharded from the start, because one device may not have room for what all workers keep.
    places = shardings(PerWorker(jax.eval_shape(all_workers), axis_name), mesh)
    specs = jax.tree.map(lambda place: place.spec, places.value)
    return PerWorker(jax.jit(all_workers, out_shardings=specs)(), axis_name)
