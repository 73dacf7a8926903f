"""The training steps of the experiments at the papers' settings, for ahead-of-time compilation.

``make aot`` runs ``python -m kernels_pallas.aot --programs ... benchmarks.aot.experiments``.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effscale.experiments import (
    data_efficiency,
    finetune,
    moe,
    onebit,
    quickstart,
    random_ltd_bert,
    random_ltd_vit,
    seqlen_curriculum,
    xtc,
)
from effscale.experiments.shared.classifier.model import classifier_config
from effscale.experiments.xtc.arms import BINARY, Arm
from effscale.models import Transformer, bert, take_layers, vit
from effscale.optim import Workers, onebit_adam
from effscale.parallel import MeshConfig, per_worker
from effscale.parallel.placement import lower_step
from effscale.study import Point
from effscale.training import (
    Clip,
    create_train_state,
    make_train_step,
    next_token_loss,
)
from kernels_pallas.aot import Program


def programs() -> list[Program]:
    """Return the ``paper`` presets on eight chips: the quickstart in two layouts, the others with short rows and dropped tokens."""
    layouts = {
        "data 8": MeshConfig(data=8),
        "data 2, fsdp 2, tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
    }
    found = [
        Program(
            name=f"quickstart paper, {name}",
            lower=functools.partial(lower_quickstart, mesh=mesh),
        )
        for name, mesh in layouts.items()
    ]
    found.append(
        Program(
            name="data_efficiency paper, 1152 tokens of 2048, 768 kept, fsdp 8",
            lower=lower_data_efficiency,
        )
    )
    found += [
        Program(
            name=f"seqlen_curriculum paper, 4096 rows, {which} tokens, fsdp 8",
            lower=lambda devices, place=place: lower_seqlen_curriculum(devices, place),
        )
        for which, place in (("64", 0), ("1024", -1))
    ]
    found += [
        Program(name="finetune paper, fashion, data 8", lower=lower_finetune),
        Program(name="random_ltd_vit paper, 32 tokens of 197, data 8", lower=lower_random_ltd_vit),
        Program(
            name="random_ltd_bert paper, 496 tokens of 512, data 8", lower=lower_random_ltd_bert
        ),
        Program(
            name="1-bit Adam, quickstart's paper model, data 2, fsdp 2, tensor 2",
            lower=lower_onebit_adam,
        ),
        Program(
            name="onebit paper, bert, onebit_adam, 8 workers",
            lower=functools.partial(lower_onebit, "bert", "onebit_adam"),
        ),
        Program(name="xtc paper, 6 binary layers and their teacher, data 8", lower=lower_xtc),
        Program(
            name="moe paper, pr_moe_mos and its teacher, expert 8",
            lower=lower_moe,
            targets=("v6e", "h100"),  # does not fit into the 16 GB of a v5e
        ),
    ]
    return found


def _packed_rows(shape: tuple[int, int]) -> dict[str, jax.ShapeDtypeStruct]:
    types = dict.fromkeys(("input_ids", "labels", "segment_ids", "positions"), jnp.int32)
    types["loss_weights"] = jnp.float32
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in types.items()}


def _images(rows: int, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        "images": jax.ShapeDtypeStruct((rows, size, size, 3), jnp.float32),
        "labels": jax.ShapeDtypeStruct((rows,), jnp.int32),
        "weights": jax.ShapeDtypeStruct((rows,), jnp.float32),
    }


def lower_quickstart(devices: Sequence[Any], mesh: MeshConfig) -> jax.stages.Lowered:
    """Lower the quickstart's step."""
    config = dataclasses.replace(quickstart.PRESETS["paper"], mesh=mesh)
    rows = _packed_rows((config.batch_size, config.length))
    return quickstart.run(config).lower(devices, batch=rows)


def lower_onebit(
    task: onebit.Task, name: onebit.OptimizerName, devices: Sequence[Any]
) -> jax.stages.Lowered:
    """Lower the step of the experiment onebit with one worker per device, each with the rows of one of the paper's 64 workers."""
    config = onebit.PRESETS["paper"]
    plan = getattr(config, task)
    rows = plan.batch_size // config.workers * len(devices)
    batch = _packed_rows((rows, plan.length))
    return onebit.run(config, task, name).lower(devices, batch=batch)


def lower_onebit_adam(devices: Sequence[Any]) -> jax.stages.Lowered:
    """Lower the quickstart's step with 1-bit Adam between two workers of four devices each."""
    config = quickstart.PRESETS["paper"]
    optimizer = onebit_adam(
        1e-4, freeze_step=config.steps // 5, clip=Clip(1.0), workers=Workers("data")
    )
    model = config.model.build(config.vocab_size, config.length)
    step = make_train_step(
        next_token_loss, optimizer, accumulate=config.accumulate, axis_name="data"
    )
    create = lambda: create_train_state(
        Transformer(model, rngs=nnx.Rngs(0)), optimizer, key=jax.random.key(0)
    )
    shape = (config.batch_size, config.length)
    batch = dict.fromkeys(
        ("input_ids", "labels", "segment_ids", "positions"), jax.ShapeDtypeStruct(shape, jnp.int32)
    )
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).build(devices)
    return lower_step(per_worker(step), create, batch, mesh)


def lower_seqlen_curriculum(devices: Sequence[Any], place: int) -> jax.stages.Lowered:
    """Lower the step of seqlen_curriculum's large batch; ``place`` is the index of the length in the curriculum."""
    config = seqlen_curriculum.PRESETS["paper"]
    plan = seqlen_curriculum.plans(config)["large_curriculum_x4"]
    run = dataclasses.replace(seqlen_curriculum.run(config, plan), mesh=MeshConfig(fsdp=8))
    batch = _packed_rows((plan.batch_size, config.length))
    del batch["loss_weights"]
    return run.lower(devices, batch=batch, stage=place)


def lower_finetune(devices: Sequence[Any]) -> jax.stages.Lowered:
    """Lower the step of finetune on images, for a ViT-S with patch 14."""
    config = finetune.PRESETS["paper"]
    rows, size = config.fashion.batch_size, config.image_size
    trunk = vit(num_layers=12, d_model=384, num_heads=6, image_size=size, patch_size=14)
    steps = 60_000 // rows * config.fashion.epochs
    run = finetune.run(config, config.fashion, steps, classifier_config(trunk, 10))
    run = dataclasses.replace(run, mesh=MeshConfig(data=8))
    return run.lower(devices, batch=_images(rows, size))


def lower_random_ltd_vit(devices: Sequence[Any]) -> jax.stages.Lowered:
    """Lower the step of random_ltd_vit that keeps the fewest tokens, for a ViT-S with patch 16."""
    config = random_ltd_vit.PRESETS["paper"]
    rows, size = config.recipe.batch_size, config.image_size
    model = classifier_config(vit(num_layers=12, d_model=384, num_heads=6, image_size=size), 10)
    steps = 60_000 // rows * config.recipe.epochs
    plan = random_ltd_vit.plan(config, "random_ltd", model, steps)
    run = dataclasses.replace(random_ltd_vit.run(config, plan), mesh=MeshConfig(data=8))
    return run.lower(devices, batch=_images(rows, size), stage=0)


def lower_random_ltd_bert(devices: Sequence[Any]) -> jax.stages.Lowered:
    """Lower the step of random_ltd_bert that keeps the most tokens without keeping all."""
    config = random_ltd_bert.PRESETS["paper"]
    plan = random_ltd_bert.plan(config, "random_ltd", config.vocab_size)
    run = dataclasses.replace(random_ltd_bert.run(config, plan), mesh=MeshConfig(data=8))
    return run.lower(devices, batch=_packed_rows((config.batch_size, config.length)))


def lower_xtc(devices: Sequence[Any]) -> jax.stages.Lowered:
    """Lower the step of xtc that trains binary layers, for a BERT-base."""
    config = xtc.PRESETS["paper"]
    trunk = bert(num_layers=12, d_model=768, num_heads=12, dropout=0.1)
    arm = Arm(kind=BINARY, config=config)
    teacher = lambda: Transformer(classifier_config(trunk, config.classes), rngs=nnx.Rngs(0))

    def create() -> Any:
        student = arm.begin(take_layers(teacher(), config.teacher_layers))
        optimizer = arm.optimizer(config.rates[0], config.budgets[-1])
        return create_train_state(student, optimizer, key=jax.random.key(0))

    rows = jax.ShapeDtypeStruct((config.batch_size, config.passage), jnp.int32)
    weights = jax.ShapeDtypeStruct((config.batch_size,), jnp.float32)
    batch = {"input_ids": rows, "attention_mask": rows, "weights": weights}
    mesh = MeshConfig(data=8).build(devices)
    return lower_step(arm.train_step(), create, batch, mesh, frozen=teacher)


def lower_data_efficiency(devices: Sequence[Any]) -> jax.stages.Lowered:
    """Lower a step of data_efficiency with a shortened row and dropped tokens."""
    config = data_efficiency.PRESETS["paper"]
    planned = data_efficiency.plan(config, "cl_ltd", 1.0, config.vocab_size)
    point = Point(config.learning_rate, config.warmup)
    run = data_efficiency.run(config, "cl_ltd", 1.0, point, config.vocab_size)
    stage = planned.stages.values.index((1152, 768))
    return run.lower(devices, batch=_packed_rows((config.batch_size, config.length)), stage=stage)


def lower_moe(devices: Sequence[Any]) -> jax.stages.Lowered:
    """Lower the step of a student of 350M+PR-MoE-32/64 with its teacher, with experts sharded over 8 devices."""
    config = moe.PRESETS["paper"]
    run = dataclasses.replace(moe.run(config, "pr_moe_mos"), mesh=MeshConfig(data=1, expert=8))
    teacher = moe.transformer(config, "pr_moe", config.vocab_size)
    return run.lower(
        devices,
        batch=_packed_rows((config.batch_size, config.length)),
        stage=0,
        frozen=lambda: Transformer(teacher, rngs=nnx.Rngs(0)),
    )
