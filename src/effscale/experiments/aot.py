"""The experiments' training steps at the papers' own settings, to be compiled for machines that are not here.

``make aot`` runs ``python -m kernels_pallas.aot --programs ... effscale.experiments.aot``.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effscale.experiments import data_efficiency, quickstart
from effscale.experiments.pretraining import Pretraining
from effscale.parallel import MeshConfig, batch_sharding, shardings
from kernels_pallas.aot import Program


def programs() -> list[Program]:
    """The ``paper`` presets on eight chips: the quickstart's in two layouts, data_efficiency's with short rows and dropped tokens."""
    layouts = {
        "data 8": MeshConfig(data=8),
        "data 2, fsdp 2, tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
    }
    found = [
        Program(
            name=f"quickstart paper, {name}",
            lower=lambda devices, mesh=mesh: lower_train_step(
                quickstart.PRESETS["paper"], mesh, devices
            ),
        )
        for name, mesh in layouts.items()
    ]
    paper = data_efficiency.PRESETS["paper"]
    both = paper.pretraining("cl_ltd", 1.0)
    found.append(
        Program(
            name="data_efficiency paper, 1152 tokens of 2048, 768 kept, fsdp 8",
            lower=lambda devices: lower_train_step(both, paper.mesh, devices, (1152, 768)),
        )
    )
    return found


def lower_train_step(
    config: quickstart.Config,
    mesh_config: MeshConfig,
    devices: Sequence[Any],
    shape: tuple[int, int] | None = None,
) -> jax.stages.Lowered:
    """The donated training step of a quickstart config, lowered for ``devices``.

    Args:
        config: What is trained.
        mesh_config: How devices are laid out.
        devices: The devices.
        shape: Tokens of a row and how many are kept, a stage of the config's technique; None takes the last one.

    Raises:
        ValueError: The shape is no stage's.
    """
    mesh = mesh_config.build(devices)
    training = Pretraining(config, config.vocab_size, mesh)
    shapes = training.plan.stages.values
    length, kept = shape or shapes[-1]
    if (length, kept) not in shapes:
        raise ValueError(f"shape={shape} is no stage's; they are {shapes}")
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    with jax.set_mesh(mesh):
        state = jax.eval_shape(lambda: training.create(config.seed))
        layout = shardings(state, mesh)
        types = dict.fromkeys(("input_ids", "labels", "segment_ids", "positions"), jnp.int32)
        types["loss_weights"] = jnp.float32
        batch: dict[str, Any] = {
            name: jax.ShapeDtypeStruct(
                (config.batch_size, length), dtype, sharding=batch_sharding(mesh)
            )
            for name, dtype in types.items()
        }
        if training.plan.ltd is not None:
            batch = training.plan.ltd.shape_batch(batch, kept)
        jitted = jax.jit(training.step, donate_argnums=0, out_shardings=(layout, None))
        return jitted.lower(jax.tree.map(place, state, layout), batch)
