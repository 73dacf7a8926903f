"""Training steps with rows of 2,048 tokens, with fused and with block-wise attention, for ahead-of-time compilation.

``make aot`` compiles them, and fails if a program with fused attention contains an array of attention scores.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.kernels.attention import Shape, lower_on_eight, with_tag
from effscale.models import Transformer, build_context, preset
from effscale.models.attention import in_blocks
from effscale.models.config import AttentionImplementation, Remat
from effscale.models.positions import Alibi
from effscale.parallel import MeshConfig
from effscale.parallel.placement import lower_step
from effscale.training import create_train_state, make_train_step, next_token_loss
from kernels_pallas.aot import Program

MODEL, LENGTH, ROWS = "gpt3-1.3b", 2048, 32
MESH = MeshConfig(data=2, fsdp=2, tensor=2)
# With remat "dots", block-wise attention keeps its scores, which do not fit into a v5e.
STEPS: tuple[tuple[str, Remat, AttentionImplementation], ...] = (
    ("v5e", "full", "splash"),
    ("v5e", "full", "blocks"),
    ("v5e", "dots", "splash"),
    ("h100", "full", "cudnn"),
    ("h100", "full", "blocks"),
)


def programs() -> list[Program]:
    """Return steps of a GPT on v5e and H100, and BLOOM's attention by itself in blocks."""
    shape = next(shape for shape in with_tag("aot") if shape.name == "bloom")
    found = [
        Program(
            name="attention bloom x8 blocks",
            lower=functools.partial(lower_blocks, shape),
            flops=shape.flops(),
        )
    ]
    for target, remat, implementation in STEPS:
        program = Program(
            name=f"train {MODEL} {LENGTH} tokens, remat {remat}, {implementation}",
            lower=functools.partial(lower_train_step, remat, implementation),
            targets=(target,),
            without=None if implementation == "blocks" else scores(),
        )
        found.append(program)
    return found


def scores() -> str:
    """Return a regular expression that matches arrays with a device's rows, its heads, and twice a quarter of the sequence or more."""
    rows = ROWS // (MESH.data * MESH.fsdp)
    heads = preset(MODEL).blocks[0].attention.num_heads // MESH.tensor
    part = "|".join(str(LENGTH * quarters // 4) for quarters in range(1, 5))
    return rf"\b\w+\[(?:\d+,)*(?:{rows},{heads}|{rows * heads}),(?:{part}),(?:{part})\]"


def lower_train_step(
    remat: Remat, implementation: AttentionImplementation, devices: Sequence[Any]
) -> jax.stages.Lowered:
    """Lower a step with AdamW on rows of one segment."""
    config = dataclasses.replace(
        preset(MODEL), dtype="bfloat16", remat=remat, attention_implementation=implementation
    )
    optimizer = optax.adamw(1e-4)
    create = lambda: create_train_state(
        Transformer(config, rngs=nnx.Rngs(0)), optimizer, key=jax.random.key(0)
    )
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    batch = {"input_ids": tokens, "labels": tokens}
    step = make_train_step(next_token_loss, optimizer)
    return lower_step(step, create, batch, MESH.build(devices))


def lower_blocks(shape: Shape, devices: Sequence[Any]) -> jax.stages.Lowered:
    """Lower what the fused programs of a shape compute, in blocks."""

    def total(query, keys, values, segments, positions):
        context = build_context(
            shape.seq,
            kind=Alibi() if shape.alibi else None,
            head_dim=shape.head_dim,
            causal=shape.causal,
            segments=segments,
            positions=positions,
        )
        bias = shape.bias(positions)
        slopes = None if bias is None else bias.slopes
        out = in_blocks(query, keys, values, context, slopes=slopes)
        return out.astype(jnp.float32).sum()

    return lower_on_eight(jax.value_and_grad(total, (0, 1, 2)), shape, devices)
