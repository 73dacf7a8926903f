"""Pallas TPU kernel: the inputs are quantized in VMEM, so no separate pass over them is needed.

A tile of rows stays while the weights of the outputs stream by. The first of these steps quantizes the rows into scratch
memory; the others reuse the codes. Weights are unpacked in VMEM, four codes of a word at a time.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int8, Int32

from kernels_pallas import dispatch
from kernels_pallas.manual_axes import result_type, varying_axes
from kernels_pallas.packed_codes import VMEM_BUDGET, VMEM_LIMIT, inputs_of_planes, planes_of_tile
from kernels_pallas.quantized_matmul.reference import encode, finish, range_scale, symmetric_scale

_LANES = 128
# Number of rows that are quantized at a time: the sublanes of a register of bytes.
_CHUNK = 32


def why_not(x: Any, weight: Any, bits: int) -> str | None:
    """Return why the kernel does not support these operands, or None."""
    del weight
    if reason := dispatch.small_vmem():
        return reason
    if tiles(x.shape[1], bits, x.dtype.itemsize) is None:
        return f"d_in={x.shape[1]} leaves no room for a tile in VMEM"
    return None


def tiles(d_in: int, bits: int, itemsize: int) -> tuple[int, int] | None:
    """Return the largest numbers of resident rows and of streamed outputs that fit in VMEM together."""
    planes = 8 // bits
    wide = _padded(d_in // planes)
    for rows in (512, 256, 128, 64, 32):
        for outputs in (512, 256, 128):
            inputs = planes * wide * rows * (2 * itemsize + 1)  # double buffered; codes
            floats = 3 * 4 * planes * wide * _CHUNK  # while the codes are computed
            weights = wide * outputs * (2 if bits == 8 else 2 + 3 * planes)  # words and planes
            results = rows * outputs * (2 * itemsize + 3 * 4)
            if inputs + floats + weights + results <= VMEM_BUDGET:
                return rows, outputs
    return None


def _padded(size: int, multiple: int = _LANES) -> int:
    return pl.cdiv(size, multiple) * multiple


def _quantize(x_ref: Any, codes_ref: Any, scales_ref: Any, zeros_ref: Any, width: int) -> None:
    """Compute codes and scales of the rows, and their zero points if there is memory for them."""
    planes, rows, wide = x_ref.shape

    def some_rows(chunk, _):
        where = pl.ds(chunk * _CHUNK, _CHUNK)
        x = x_ref[:, where, :].astype(jnp.float32)

        def real(x, otherwise):  # the tile extends past the array and reads undefined values there
            if wide == width:
                return x
            inside = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) < width
            return jnp.where(inside, x, otherwise)

        over_row = lambda most, x: most(most(x, axis=2, keepdims=True), axis=0)
        if zeros_ref is None:
            scale, zero = symmetric_scale(over_row(jnp.max, jnp.abs(real(x, 0.0)))), None
        else:
            ends = over_row(jnp.min, real(x, jnp.inf)), over_row(jnp.max, real(x, -jnp.inf))
            scale, zero = range_scale(*ends)
            zeros_ref[where, :] = zero
        scales_ref[where, :] = scale
        for plane in range(planes):
            codes = real(encode(x[plane], scale, zero), 0.0)
            codes_ref[plane, where, :] = codes.astype(jnp.int8)

    jax.lax.fori_loop(0, rows // _CHUNK, some_rows, None)


def _kernel(
    x_ref, weight_ref, vectors, out_ref, codes_ref, scales_ref, zeros_ref,
    *, bits: int, width: int, activation: Any,
) -> None:  # fmt: skip
    """Run the kernel; ``vectors`` belong to the outputs; codes, scales and zero points of the rows are in scratch memory."""

    @pl.when(pl.program_id(1) == 0)
    def _():
        _quantize(x_ref, codes_ref, scales_ref, zeros_ref, width)

    # Codes past the end are multiplied by zero inputs.
    parts = [
        jax.lax.dot_general(
            codes_ref[plane],
            codes,
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.int32,
        )
        for plane, codes in enumerate(planes_of_tile(weight_ref[...], bits))
    ]
    sums = sum(parts[1:], start=parts[0])
    y = sums.astype(jnp.float32) * scales_ref[...]
    if zeros_ref is not None:
        y += zeros_ref[...] * vectors.code_sums[...].astype(jnp.float32)
    y *= vectors.scale[...]
    bias = None if vectors.bias is None else vectors.bias[...]
    out_ref[...] = finish(y, bias, activation).astype(out_ref.dtype)


class _Vectors(NamedTuple):
    """The vectors of the outputs."""

    scale: Any
    bias: Any
    code_sums: Any


def quantized_matmul(
    x: Float[Array, "rows d_in"],
    weight: Int8[Array, "d_out bytes"],
    scale: Float[Array, " d_out"],
    bias: Float[Array, " d_out"] | None,
    code_sums: Int32[Array, " d_out"] | None = None,
    *,
    bits: int,
    activation: Callable[[Array], Array] | None,
    interpret: Any = False,
) -> Float[Array, "rows d_out"]:
    """See ``kernels_pallas.quantized_matmul``; ``interpret`` as in ``pl.pallas_call``."""
    (rows, d_in), (d_out, width) = x.shape, weight.shape
    planes, wide = 8 // bits, _padded(width)
    fitting = tiles(d_in, bits, x.dtype.itemsize)
    assert fitting is not None, "why_not rejects such widths"
    block_rows, block_outputs = min(fitting[0], _padded(rows, _CHUNK)), fitting[1]
    grid = pl.cdiv(rows, block_rows), pl.cdiv(d_out, block_outputs)
    axes = varying_axes(x, weight, scale, bias, code_sums)
    row = pl.BlockSpec((1, block_outputs), lambda i, j: (0, j))
    vectors = jax.tree.map(lambda a: a[None], _Vectors(scale, bias, code_sums))
    of_rows = pltpu.VMEM((block_rows, 1), jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, bits=bits, width=width, activation=activation),
        grid=grid,
        in_specs=[
            pl.BlockSpec((planes, block_rows, wide), lambda i, j: (0, i, 0)),
            pl.BlockSpec((block_outputs, wide), lambda i, j: (j, 0)),
            jax.tree.map(lambda _: row, vectors),
        ],
        out_specs=pl.BlockSpec((block_rows, block_outputs), lambda i, j: (i, j)),
        out_shape=result_type((rows, d_out), x.dtype, axes),
        scratch_shapes=[
            pltpu.VMEM((planes, block_rows, wide), jnp.int8),
            of_rows,
            None if code_sums is None else of_rows,
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * d_in * d_out,
            transcendentals=0,
            bytes_accessed=(x.size + rows * d_out) * x.dtype.itemsize + grid[0] * weight.size,
        ),
        interpret=interpret,
    )(inputs_of_planes(x, weight), weight, vectors)
