"""Pallas TPU kernel of ``matmul_scatter``: the experts' outputs for a token are summed in VMEM, in float32.

Tiles of outputs are the outer loop, and steps through the sorted rows the inner one. The sums of all tokens stay in scratch
memory meanwhile. After each product, its rows are added to them one at a time, so no two additions conflict.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas.expert_matmul.tpu import vmem
from kernels_pallas.expert_matmul.tpu.steps import Steps, make_steps
from kernels_pallas.manual_axes import result_type, varying_axes


def why_not(h: Any, weight: Any, num_tokens: int) -> str | None:
    """Return why the kernel does not support these operands, or None."""
    rows, d_in = h.shape
    outputs = vmem.scatter_outputs(num_tokens, rows, d_in, h.dtype)
    return vmem.why_not(rows, h.dtype, outputs)


def _kernel(
    steps: Steps, target_ref, scale_ref, h_ref, weight_ref, bias_ref, out_ref, totals_ref, made_ref
) -> None:
    step = pl.program_id(1)
    start = steps.tile[step] * h_ref.shape[0]
    first, last = steps.first[step], jnp.minimum(steps.last[step], steps.filled[0])

    @pl.when(step == 0)
    def _():
        totals_ref[...] = jnp.zeros_like(totals_ref)

    @pl.when(first < last)
    def _():
        y = jnp.dot(h_ref[...], weight_ref[0], preferred_element_type=jnp.float32)
        made_ref[...] = y if bias_ref is None else y + bias_ref[0].astype(jnp.float32)

        tokens = totals_ref.shape[0]

        def add(row, _):
            token = pl.ds(jnp.clip(target_ref[row], 0, tokens - 1), 1)
            totals_ref[token, :] += scale_ref[row] * made_ref[pl.ds(row - start, 1), :]

        jax.lax.fori_loop(first, last, add, None)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = totals_ref[...].astype(out_ref.dtype)


def matmul_scatter(
    h: Float[Array, "rows d_in"],
    weight: Float[Array, "groups d_in d_out"],
    sizes: Int[Array, " groups"],
    target: Int[Array, " rows"],
    scale: Float[Array, " rows"],
    bias: Float[Array, "groups d_out"] | None,
    num_tokens: int,
    interpret: Any = False,
) -> Float[Array, "tokens d_out"]:
    """See ``kernels_pallas.expert_matmul.matmul_scatter``; ``interpret`` as in ``pl.pallas_call``."""
    (rows, d_in), (groups, _, d_out) = h.shape, weight.shape
    tile = vmem.tile_of_rows(rows)
    outputs = vmem.scatter_outputs(num_tokens, rows, d_in, h.dtype)
    assert outputs is not None, "why_not rejects such operands"
    steps = make_steps(sizes, rows, tile, interpret=interpret)
    axes = varying_axes(h, weight, sizes, target, scale, bias)
    of_group = lambda j, s, steps, *_: (steps.group[s], 0, j)
    grid = pl.cdiv(d_out, outputs), steps.tile.shape[0]
    read = grid[0] * h.size + min(groups, rows) * d_in * d_out + num_tokens * d_out
    return pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=grid,
            in_specs=[
                pl.BlockSpec((tile, d_in), lambda j, s, steps, *_: (steps.tile[s], 0)),
                pl.BlockSpec((1, d_in, outputs), of_group),
                None if bias is None else pl.BlockSpec((1, 1, outputs), of_group),
            ],
            out_specs=pl.BlockSpec((num_tokens, outputs), lambda j, s, *_: (0, j)),
            scratch_shapes=[
                pltpu.VMEM((num_tokens, outputs), jnp.float32),
                pltpu.VMEM((tile, outputs), jnp.float32),
            ],
        ),
        out_shape=result_type((num_tokens, d_out), h.dtype, axes),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=vmem.LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * d_in * d_out,
            transcendentals=0,
            bytes_accessed=read * h.dtype.itemsize,
        ),
        interpret=interpret,
    )(steps, target.astype(jnp.int32), scale, h, weight, None if bias is None else bias[:, None])
