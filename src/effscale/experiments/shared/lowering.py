"""A training step lowered for a mesh of devices that may be only described."""

from collections.abc import Callable
from typing import Any

import jax

from effscale.parallel import batch_sharding, shardings


def lower_step(
    step: Callable[..., Any],
    create: Callable[[], Any],
    batch: Any,
    mesh: jax.sharding.Mesh,
    shape_batch: Callable[[Any], Any] = lambda batch: batch,
    frozen: Callable[[], Any] | None = None,
) -> jax.stages.Lowered:
    """A donated step, lowered for a mesh.

    Args:
        step: From state and batch to state and metrics.
        create: Makes the state.
        batch: Types of a batch's arrays, a tree, which are divided by rows.
        mesh: The mesh.
        shape_batch: What a stage of a technique does to the batch.
        frozen: Makes what the step is given as ``frozen``; None gives it nothing.
    """
    with jax.set_mesh(mesh):
        given = {} if frozen is None else {"frozen": placed(jax.eval_shape(frozen), mesh)}
        state = jax.eval_shape(create)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings(state, mesh), None))
        rows = placed_rows(batch, mesh)
        return jitted.lower(placed(state, mesh), shape_batch(rows), **given)


def placed(types: Any, mesh: jax.sharding.Mesh) -> Any:
    """Types of a tree's arrays with the shardings that the rules in force give them."""
    return jax.tree.map(_with_sharding, types, shardings(types, mesh))


def placed_rows(types: Any, mesh: jax.sharding.Mesh) -> Any:
    """Types of a batch's arrays, divided by rows."""
    return jax.tree.map(lambda x: _with_sharding(x, batch_sharding(mesh)), types)


def _with_sharding(x: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
