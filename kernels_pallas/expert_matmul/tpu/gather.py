"""Pallas TPU kernel of ``gather_matmul``: the sorted rows exist only in VMEM.

The tokens are read once, in their original order. Tiles of outputs are the outer loop, and steps through the rows the inner
one. The first round gathers each tile of rows into scratch memory, where the other rounds find it. A weight is read once,
and only if its group has rows.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas.expert_matmul.reference import finish
from kernels_pallas.expert_matmul.tpu import vmem
from kernels_pallas.expert_matmul.tpu.steps import Steps, make_steps
from kernels_pallas.manual_axes import result_type, varying_axes


def why_not(x: Any, weight: Any, source: Any, gate: Any) -> str | None:
    """Return why the kernel does not support these operands, or None."""
    outputs = _outputs(x, source.shape[0], gate)
    return vmem.why_not(source.shape[0], x.dtype, outputs)


def _outputs(x: Any, rows: int, gate: Any) -> int | None:
    tokens, d_in = x.shape
    return vmem.gather_outputs(tokens, d_in, rows, 1 if gate is None else 2, x.dtype)


def _gather(source_ref: Any, tokens_ref: Any, picked_ref: Any, first: Any) -> None:
    """Gather the tokens of a tile's rows. ``tokens_ref`` and ``picked_ref`` are float32, because single rows need 32 bits."""
    tokens = tokens_ref.shape[0]

    def one(row, _):
        token = jnp.clip(source_ref[first + row], 0, tokens - 1)
        picked_ref[pl.ds(row, 1), :] = tokens_ref[pl.ds(token, 1), :]

    there = jnp.minimum(picked_ref.shape[0], source_ref.shape[0] - first)
    jax.lax.fori_loop(0, there, one, None)


def _kernel(
    steps: Steps, source_ref, x_ref, pairs, out_ref, tokens_ref, picked_ref, rows_ref,
    *, activation: Any,
) -> None:  # fmt: skip
    """``pairs`` are weight and bias of the product, and of the gate if there is one."""
    output, step = pl.program_id(0), pl.program_id(1)
    size = picked_ref.shape[0]
    first = pl.multiple_of(steps.tile[step] * size, size)
    before = steps.tile[jnp.maximum(step - 1, 0)]

    @pl.when((output == 0) & (step == 0))
    def _():
        tokens_ref[...] = x_ref[...].astype(jnp.float32)

    @pl.when((output == 0) & ((step == 0) | (steps.tile[step] != before)))
    def _():
        _gather(source_ref, tokens_ref, picked_ref, first)
        rows_ref[pl.ds(first, size), :] = picked_ref[...].astype(rows_ref.dtype)

    @pl.when(steps.first[step] < steps.last[step])
    def _():
        rows = rows_ref[pl.ds(first, size), :]

        def product(weight_ref, bias_ref):
            y = jnp.dot(rows, weight_ref[0], preferred_element_type=jnp.float32)
            return y if bias_ref is None else y + bias_ref[0].astype(jnp.float32)

        up, *gate = (product(*pair) for pair in pairs)
        y = finish(up, gate[0] if gate else None, activation)
        row = first + jax.lax.broadcasted_iota(jnp.int32, y.shape, 0)
        y = jnp.where(row < steps.filled[0], y, 0).astype(out_ref.dtype)
        # The tile's other rows are handled in other steps.
        own = (row >= steps.first[step]) & (row < steps.last[step])
        out_ref[...] = jnp.where(own, y, out_ref[...])


def gather_matmul(
    x: Float[Array, "tokens d_in"],
    weight: Float[Array, "groups d_in d_out"],
    sizes: Int[Array, " groups"],
    source: Int[Array, " rows"],
    bias: Float[Array, "groups d_out"] | None,
    gate: Float[Array, "groups d_in d_out"] | None,
    gate_bias: Float[Array, "groups d_out"] | None,
    activation: Callable[[Array], Array] | None,
    interpret: Any = False,
) -> Float[Array, "rows d_out"]:
    """See ``kernels_pallas.expert_matmul.gather_matmul``; ``interpret`` as in ``pl.pallas_call``."""
    (tokens, d_in), (groups, _, d_out), rows = x.shape, weight.shape, source.shape[0]
    tile, outputs = vmem.tile_of_rows(rows), _outputs(x, rows, gate)
    assert outputs is not None, "why_not rejects such operands"
    steps = make_steps(sizes, rows, tile, interpret=interpret)
    axes = varying_axes(x, weight, sizes, source, bias, gate, gate_bias)
    grid = pl.cdiv(d_out, outputs), steps.tile.shape[0]

    of_group = lambda j, s, steps, _: (steps.group[s], 0, j)
    pairs = [(weight, bias)] if gate is None else [(weight, bias), (gate, gate_bias)]
    pairs = [(w, None if b is None else b[:, None]) for w, b in pairs]
    specs = [
        tuple(None if a is None else pl.BlockSpec((1, a.shape[1], outputs), of_group) for a in pair)
        for pair in pairs
    ]
    product = d_in * d_out * len(pairs)
    return pl.pallas_call(
        functools.partial(_kernel, activation=activation),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=[
                pl.BlockSpec((tokens, d_in), lambda *_: (0, 0), pipeline_mode=pl.Buffered(1)),
                specs,
            ],
            out_specs=pl.BlockSpec((tile, outputs), lambda j, s, steps, _: (steps.tile[s], j)),
            scratch_shapes=[
                pltpu.VMEM((tokens, d_in), jnp.float32),
                pltpu.VMEM((tile, d_in), jnp.float32),
                pltpu.VMEM((vmem.padded(rows, tile), d_in), x.dtype),
            ],
        ),
        out_shape=result_type((rows, d_out), x.dtype, axes),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=vmem.LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * product,
            transcendentals=rows * d_out,
            bytes_accessed=(x.size + min(groups, rows) * product + rows * d_out) * x.dtype.itemsize,
        ),
        interpret=interpret,
    )(steps, source.astype(jnp.int32), x, pairs)
