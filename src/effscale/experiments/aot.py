"""The experiments' training steps at the papers' own settings, to be compiled for machines that are not here.

``make aot`` runs ``python -m kernels_pallas.aot --programs ... effscale.experiments.aot``.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effscale.experiments import quickstart
from effscale.models import Transformer
from effscale.parallel import MeshConfig, batch_sharding, shardings
from effscale.training import create_train_state, make_train_step, next_token_loss
from kernels_pallas.aot import Program


def programs() -> list[Program]:
    """The quickstart's ``paper`` preset on eight chips, in two layouts."""
    layouts = {
        "data 8": MeshConfig(data=8),
        "data 2, fsdp 2, tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
    }
    return [
        Program(
            name=f"quickstart paper, {name}",
            lower=lambda devices, mesh=mesh: lower_train_step(
                quickstart.PRESETS["paper"], mesh, devices
            ),
        )
        for name, mesh in layouts.items()
    ]


def lower_train_step(
    config: quickstart.Config, mesh_config: MeshConfig, devices: Sequence[Any]
) -> jax.stages.Lowered:
    """The donated training step of a quickstart config, lowered for ``devices``."""
    mesh = mesh_config.build(devices)
    schedule = config.schedule()
    optimizer = config.optimizer.build(schedule)
    model_config = config.model.build(config.vocab_size, config.length)

    def create() -> Any:
        model = Transformer(model_config, rngs=nnx.Rngs(config.seed))
        return create_train_state(model, optimizer, key=jax.random.key(config.seed))

    step = make_train_step(
        next_token_loss, optimizer, accumulate=config.accumulate, clip_norm=config.clip_norm
    )
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    with jax.set_mesh(mesh):
        state = jax.eval_shape(create)
        layout = shardings(state, mesh)
        shape = (config.batch_size, config.length)
        types = dict.fromkeys(("input_ids", "labels", "segment_ids", "positions"), jnp.int32)
        types["loss_weights"] = jnp.float32
        batch = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
            for name, dtype in types.items()
        }
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(layout, None))
        return jitted.lower(jax.tree.map(place, state, layout), batch)
