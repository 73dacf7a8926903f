"""What each worker keeps for itself, before the first step."""

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
    """Zeros for each worker, where the axis is bound (``jax.shard_map``, ``jax.vmap``) and where it is not.

    Args:
        make: From the number of workers to one worker's zeros.
        axis_name: The workers' axis.
        num_workers: How many there are, where neither a bound axis nor the mesh in use (``jax.set_mesh``) says it.

    Raises:
        ValueError: Nobody says how many workers there are, or two differ.
    """
    bound, mesh = bound_axis_size(axis_name), jax.sharding.get_abstract_mesh()
    known = bound
    if known is None:
        known = None if mesh.empty else mesh.shape.get(axis_name)
    if known is None:
        known = num_workers
    if known is None:
        raise ValueError(
            f"axis_name={axis_name!r} is not an axis of the mesh in use: enter jax.set_mesh(mesh) around the optimizer's "
            "init, or give num_workers"
        )
    if num_workers is not None and num_workers != known:
        raise ValueError(f"num_workers={num_workers}, but the axis {axis_name!r} has {known}")
    if bound is not None:
        return PerWorker(make(known), axis_name)

    def all_workers() -> Any:
        zeros = lambda x: jnp.zeros((known, *x.shape), x.dtype)
        return jax.tree.map(zeros, jax.eval_shape(functools.partial(make, known)))

    if mesh.empty or axis_name not in mesh.shape:
        return PerWorker(all_workers(), axis_name)
    # Divided from birth: on one device there may be no room for what all workers keep.
    places = shardings(PerWorker(jax.eval_shape(all_workers), axis_name), mesh)
    specs = jax.tree.map(lambda place: place.spec, places.value)
    return PerWorker(jax.jit(all_workers, out_shardings=specs)(), axis_name)
