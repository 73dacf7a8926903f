"""The programs of ``effscale.plan``: a training step, with or without a technique, and the decoding of one token."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from effscale.ltd import RandomLTD, mslg
from effscale.models import Transformer, empty_cache, matmul, unroll
from effscale.models.stacking import for_decoding
from effscale.models.weights import transpose
from effscale.optim import Workers, onebit_adam, onebit_lamb, zero_one_adam
from effscale.parallel import per_worker
from effscale.parallel.placement import lower_step, placed, placed_rows
from effscale.parallel.rules import logical_spec
from effscale.plan.cases import ONEBIT, Case, Weights
from effscale.plan.models import loss_of
from effscale.quant import Format, Recipe, Rule, quantize_model
from effscale.quant.packed import PackedWeight
from effscale.training import AdamWConfig, Clip, create_train_state, make_train_step

RATE, B2, DECAY, CLIP = 6e-5, 0.95, 0.1, Clip(1.0)

FORMATS: dict[Weights, Format | None] = {
    "bfloat16": None,
    "int8": Format(bits=8),
    "int4": Format(bits=4, granularity="group", group_size=128),
    "binary": Format(bits=1),
}
"""Formats of the layers' weights; tables and norms stay in bfloat16."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A lowered program.

    Attributes:
        lowered: The lowered program.
        parts: Types of its permanent data, by name.
    """

    lowered: jax.stages.Lowered
    parts: dict[str, Any]


def lower(case: Case, mesh: Mesh) -> Program:
    """Lower the program of a case for a mesh."""
    return _training(case, mesh) if case.decode is None else _decoding(case, case.decode, mesh)


def _training(case: Case, mesh: Mesh) -> Program:
    config, shape_batch = case.transformer(), lambda rows: rows
    loss = loss_of(config)
    if case.kept is not None:
        # The schedule of only this step; the case defines the stage.
        pacing = mslg(min_value=case.kept, max_value=case.length, require_steps=1)
        ltd, kept = RandomLTD(pacing=pacing), case.kept
        loss, shape_batch = ltd.loss(loss), lambda rows: ltd.shape_batch(rows, kept)
    if case.technique in ONEBIT:
        make = {
            "onebit_adam": onebit_adam,
            "onebit_lamb": onebit_lamb,
            "zero_one_adam": zero_one_adam,
        }[case.technique]
        optimizer = make(RATE, b2=B2, weight_decay=DECAY, clip=CLIP, workers=Workers("data"))
        step = per_worker(
            make_train_step(loss, optimizer, accumulate=case.accumulate, axis_name="data")
        )
    else:
        optimizer = AdamWConfig(b2=B2, weight_decay=DECAY).build(RATE)
        step = make_train_step(loss, optimizer, accumulate=case.accumulate, clip=CLIP)
    create = lambda: create_train_state(
        Transformer(config, rngs=nnx.Rngs(0)), optimizer, key=jax.random.key(0)
    )
    rows = jax.ShapeDtypeStruct((case.batch_size, case.length), jnp.int32)
    batch = dict.fromkeys(("input_ids", "labels"), rows)
    lowered = lower_step(step, create, batch, mesh, shape_batch)
    with jax.set_mesh(mesh):
        state = jax.eval_shape(create)
    return Program(lowered=lowered, parts={"parameters": state.model, "optimizer": state.opt_state})


def _decoding(case: Case, weights: Weights, mesh: Mesh) -> Program:
    """Lower the decoding of one token per row, with a cache that is sharded like the rows and heads."""
    config = case.transformer()

    def step(model: Any, tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        encoded = model.encode(tokens[:, None], cache=cache)
        x, table, bias = model.heads["lm"].linear(encoded.hidden[:, -1], model.embed)
        logits = matmul(x, transpose(table), bias)
        return jnp.argmax(logits, -1).astype(jnp.int32), encoded.cache

    def place(x: Any) -> Any:
        axes = ("batch", "kv_heads", None, None)[: x.ndim]
        sharding = NamedSharding(mesh, logical_spec(axes, x.shape, mesh))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    with jax.set_mesh(mesh):
        model = jax.eval_shape(lambda: for_decoding(unroll(_served(case, weights))))
        cache = jax.eval_shape(lambda: empty_cache(config, case.batch_size, case.length))
        tokens = placed_rows(jax.ShapeDtypeStruct((case.batch_size,), jnp.int32), mesh)
        jitted = jax.jit(step, donate_argnums=2)
        lowered = jitted.lower(placed(model, mesh), tokens, jax.tree.map(place, cache))
    parts = {"parameters": placed(model, mesh), "cache": jax.tree.map(place, cache)}
    return Program(lowered=lowered, parts=parts)


def _served(case: Case, weights: Weights) -> Transformer:
    """Return the model with packed layer weights and everything else in bfloat16."""
    model, form = Transformer(case.transformer(), rngs=nnx.Rngs(0)), FORMATS[weights]
    if form is not None:
        model = quantize_model(model, Recipe((Rule(where=r"layers\..*kernel", weights=form),)))
    is_packed = lambda x: isinstance(x, PackedWeight)
    low = lambda x: (
        x.astype(jnp.bfloat16) if is_packed(x) or jnp.issubdtype(x.dtype, jnp.floating) else x
    )
    return jax.tree.map(low, model, is_leaf=is_packed)
