"""Blocks with quantized weights, and the same in bfloat16, for ahead-of-time compilation.

``make aot`` compiles them, and fails if a block for a TPU still has a pass that only quantizes.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from effscale.models import (
    Transformer,
    TransformerConfig,
    bert,
    build_context,
    llama,
)
from effscale.quant import Recipe, Rule, quantize_model, w8a8
from effscale.quant.formats import Format
from effscale.quant.packed import PackedWeight
from kernels_pallas.aot import Program

TPUS = ("v5e", "v6e")
QUANTIZES = r"= s8\[[0-9,]+\]\S* fusion\("
"""Matches a fusion that writes 8-bit integers; with a kernel they stay inside it."""

W4 = Recipe((Rule(where=r"kernel", weights=Format(bits=4, granularity="group", group_size=128)),))
RECIPES: dict[str, Recipe | None] = {"bfloat16": None, "W8A8": w8a8(), "W4 in groups of 128": W4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A block applied to some tokens."""

    name: str
    model: TransformerConfig
    rows: int
    length: int
    recipes: tuple[str, ...]


CASES = (
    Case(
        name="BERT-base block, 8 x 128 tokens",
        model=bert(num_layers=1, d_model=768, num_heads=12),
        rows=8,
        length=128,
        recipes=("bfloat16", "W8A8"),
    ),
    Case(
        name="Llama-7B block, 2 x 1024 tokens",
        model=llama(num_layers=1, d_model=4096, num_heads=32, d_ff=11_008),
        rows=2,
        length=1024,
        recipes=("bfloat16", "W8A8"),
    ),
    Case(
        name="Llama-7B block, 8 x 1 tokens",
        model=llama(num_layers=1, d_model=4096, num_heads=32, d_ff=11_008),
        rows=8,
        length=1,
        recipes=("bfloat16", "W8A8", "W4 in groups of 128"),
    ),
)


def programs() -> list[Program]:
    """Return each case with each recipe, with kernels and, on TPUs, also with only the compiler."""
    found = []
    for case in CASES:
        for recipe in case.recipes:
            quantized = RECIPES[recipe] is not None
            for targets, without in ((TPUS, QUANTIZES), (("h100",), None)):
                program = Program(
                    name=f"{case.name}, {recipe}" + ", kernels" * quantized,
                    lower=functools.partial(lower_block, case, recipe, quantized),
                    targets=targets,
                    without=without,
                )
                found.append(program)
            if quantized:
                program = Program(
                    name=f"{case.name}, {recipe}, compiler",
                    lower=functools.partial(lower_block, case, recipe, False),
                    targets=TPUS,
                )
                found.append(program)
    return found


def lower_block(
    case: Case, recipe: str, with_kernels: bool, devices: Sequence[Any]
) -> jax.stages.Lowered:
    """Lower a block's forward pass on one device, in bfloat16.

    Args:
        case: The block.
        recipe: A name in ``RECIPES``.
        with_kernels: Whether to lower under a mesh of the accelerators; without one, kernels are not used.
        devices: The devices; the first one is used.
    """
    mesh = Mesh(np.asarray(devices[:1]), ("data",), axis_types=(AxisType.Auto,))
    placed = functools.partial(_placed, sharding=NamedSharding(mesh, P()))
    # Use the same attention with and without a mesh.
    config = dataclasses.replace(case.model, attention_implementation="blocks")

    def run(block, x):
        context = build_context(
            case.length,
            kind=config.positions,
            head_dim=config.groups[0].blocks[0].attention.width(config.d_model),
            causal=config.causal,
        )
        return block(x, context)[0]

    block = jax.tree.map(placed, jax.eval_shape(lambda: _block(config, RECIPES[recipe])))
    x = placed(jax.ShapeDtypeStruct((case.rows, case.length, config.d_model), jnp.bfloat16))
    if not with_kernels:
        return jax.jit(run).lower(block, x)
    with jax.set_mesh(mesh):
        return jax.jit(run).lower(block, x)


def _block(config: TransformerConfig, recipe: Recipe | None) -> Any:
    """Return the model's only block, with unquantized parameters in bfloat16."""
    model = Transformer(config, rngs=nnx.Rngs(0))
    if recipe is not None:
        model = quantize_model(model, recipe)
    block = jax.tree.map(lambda a: a[0], model.groups[0].blocks[0])
    is_packed = lambda a: isinstance(a, PackedWeight)
    low = lambda a: a if is_packed(a) else a.astype(jnp.bfloat16)
    return jax.tree.map(low, block, is_leaf=is_packed)


def _placed(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
