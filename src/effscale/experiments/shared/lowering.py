"""A training step lowered for a mesh of devices that may be only described."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from effscale.parallel import batch_sharding, shardings


def lower_step(
    step: Callable[..., Any],
    create: Callable[[], Any],
    batch: Mapping[str, Any],
    mesh: jax.sharding.Mesh,
    shape_batch: Callable[[Any], Any] = lambda batch: batch,
    frozen: Callable[[], Any] | None = None,
) -> jax.stages.Lowered:
    """A donated step, lowered for a mesh.

    Args:
        step: From state and batch to state and metrics.
        create: Makes the state.
        batch: Types of a batch's arrays, which are divided by rows.
        mesh: The mesh.
        shape_batch: What a stage of a technique does to the batch.
        frozen: Makes what the step is given as ``frozen``; None gives it nothing.
    """
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    with jax.set_mesh(mesh):
        given = {}
        if frozen is not None:
            read = jax.eval_shape(frozen)
            given["frozen"] = jax.tree.map(place, read, shardings(read, mesh))
        state = jax.eval_shape(create)
        layout = shardings(state, mesh)
        rows = {name: place(x, batch_sharding(mesh)) for name, x in batch.items()}
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(layout, None))
        return jitted.lower(jax.tree.map(place, state, layout), shape_batch(rows), **given)
