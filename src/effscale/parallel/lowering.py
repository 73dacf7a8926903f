"""Lower a training step for a mesh of devices, which need not exist."""

from collections.abc import Callable
from typing import Any

import jax

from effscale.parallel.placement import batch_sharding, shardings


def lower_step(
    step: Callable[..., Any],
    create: Callable[[], Any],
    batch: Any,
    mesh: jax.sharding.Mesh,
    shape_batch: Callable[[Any], Any] = lambda batch: batch,
    frozen: Callable[[], Any] | None = None,
) -> jax.stages.Lowered:
    """Lower a donated step for a mesh.

    Args:
        step: A function from state and batch to state and metrics.
        create: Creates the state.
        batch: Types of a batch's arrays, a tree; they are sharded by rows.
        mesh: The mesh.
        shape_batch: Applies a stage of a technique to the batch.
        frozen: Creates the ``frozen`` argument of the step; None passes nothing.
    """
    with jax.set_mesh(mesh):
        given = {} if frozen is None else {"frozen": placed(jax.eval_shape(frozen), mesh)}
        state = jax.eval_shape(create)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings(state, mesh), None))
        rows = placed_rows(batch, mesh)
        return jitted.lower(placed(state, mesh), shape_batch(rows), **given)


def placed(types: Any, mesh: jax.sharding.Mesh) -> Any:
    """Return types of a tree's arrays with the shardings of the current rules."""
    return jax.tree.map(_with_sharding, types, shardings(types, mesh))


def placed_rows(types: Any, mesh: jax.sharding.Mesh) -> Any:
    """Return types of a batch's arrays, sharded by rows."""
    return jax.tree.map(lambda x: _with_sharding(x, batch_sharding(mesh)), types)


def _with_sharding(x: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
