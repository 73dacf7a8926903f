"""Pallas TPU kernels: one read of each operand, one write of each result.

Eight rows of bytes * 128 lanes are exactly the sublanes of a vector register, so the eight signs of a byte are above each
other: packing is a sum over sublanes. The sum of squares accumulates in a block that stays in VMEM while the tiles pass by.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, UInt8

from kernels_pallas.manual_axes import result_type, varying_axes

_LANES = 128
# Size of the 8 rows of all workers in a tile, in float32; double buffers and temporaries take a dozen times as much.
_TILE_BYTES = 2**20
_VMEM_LIMIT = 56 * 2**20
_MAX_WORKERS = 512


def why_not(workers: int) -> str | None:
    """Return why the kernels do not support this many workers, or None."""
    if workers > _MAX_WORKERS:
        return (
            f"a tile of {workers} workers is too large for VMEM, which has room for {_MAX_WORKERS}"
        )
    return None


def _tile(workers: int, size: int) -> int:
    """Return the bytes of a row in a tile: whole lanes."""
    fitting = max(1, _TILE_BYTES // (workers * 8 * 4 * _LANES)) * _LANES
    return min(fitting, pl.cdiv(size, _LANES) * _LANES)


def _signs(corrected: Array) -> Array:
    """Return the bytes, as int32, of the signs of [..., 8, lanes]: row 0 is the highest bit."""
    shape = corrected.shape
    weights = jnp.left_shift(1, 7 - jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 2))
    return jnp.sum(jnp.where(corrected >= 0, weights, 0), axis=-2)


def _add_squares(squares_ref: Any, corrected: Array) -> None:
    """Add the squares of [rows, 8, lanes] to a register's worth of sums."""
    squares = jnp.sum(corrected * corrected, axis=0)
    for start in range(0, squares.shape[-1], _LANES):
        squares_ref[...] += squares[:, start : start + _LANES]


def _error(corrected: Array, scale: Array) -> Array:
    return corrected - jnp.where(corrected >= 0, scale, -scale)


def _in_place(corrected: int, interpret: Any) -> dict[int, int]:
    """Let the new sum replace the old one, ``corrected``, in memory. The interpreters would give it the shape of whole tiles."""
    return {} if interpret else {corrected: 1}


def _compress_kernel(
    scale_ref, x_ref, corrected_ref, bits_ref, new_ref, squares_ref, *, size, width
):
    tile = pl.program_id(0)

    @pl.when(tile == 0)
    def _():
        squares_ref[...] = jnp.zeros_like(squares_ref)

    shape = x_ref.shape
    column = tile * shape[2] + jax.lax.broadcasted_iota(jnp.int32, shape, 2)
    row = 8 * jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    row += jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    # Position row * width + column is below size; as rows, since the product may not fit into 32 bits.
    whole, rest = divmod(size, width)
    counts = (column < width) & ((row < whole) | ((row == whole) & (column < rest)))
    new = x_ref[...].astype(jnp.float32) + _error(corrected_ref[...], scale_ref[0])
    new = jnp.where(counts, new, 0.0)
    new_ref[...] = new
    bits_ref[...] = _signs(new).astype(bits_ref.dtype)
    _add_squares(squares_ref, new)


def compress(
    x: Float[Array, "servers 8 bytes"],
    corrected: Float[Array, "servers 8 bytes"],
    scale: Float[Array, ""],
    *,
    size: int,
    interpret: Any = False,
) -> tuple[UInt8[Array, "servers bytes"], Float[Array, "servers 8 bytes"], Float[Array, ""]]:
    """See ``kernels_pallas.sign_compress.compress``; ``interpret`` as in ``pl.pallas_call``."""
    servers, _, width = x.shape
    tile = _tile(servers, width)
    axes = varying_axes(x, corrected, scale)
    block = pl.BlockSpec((servers, 8, tile), lambda i: (0, 0, i))
    moved = x.size * (x.dtype.itemsize + 8) + servers * width
    bits, new, squares = pl.pallas_call(
        functools.partial(_compress_kernel, size=size, width=width),
        grid=(pl.cdiv(width, tile),),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), block, block],
        out_specs=[
            pl.BlockSpec((servers, tile), lambda i: (0, i)),
            block,
            pl.BlockSpec((8, _LANES), lambda i: (0, 0)),
        ],
        out_shape=[
            result_type((servers, width), jnp.uint8, axes),
            result_type(x.shape, jnp.float32, axes),
            result_type((8, _LANES), jnp.float32, axes),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=_VMEM_LIMIT
        ),
        input_output_aliases=_in_place(2, interpret),
        cost_estimate=pl.CostEstimate(flops=10 * x.size, transcendentals=0, bytes_accessed=moved),
        interpret=interpret,
    )(scale.reshape(1), x, corrected)
    return bits, new, jnp.sum(squares)


def _average_kernel(
    scales_ref,
    scale_ref,
    size_ref,
    bits_ref,
    corrected_ref,
    sent_ref,
    new_ref,
    squares_ref,
    wide_ref,
    *,
    width,
):
    tile = pl.program_id(0)

    @pl.when(tile == 0)
    def _():
        squares_ref[...] = jnp.zeros_like(squares_ref)

    workers, shape = bits_ref.shape[0], corrected_ref.shape
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    column = tile * shape[1] + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    wide_ref[...] = bits_ref[...].astype(jnp.int32)

    def add(worker, total):
        byte = jnp.broadcast_to(wide_ref[pl.ds(worker, 1), :], shape)
        positive = jnp.bitwise_and(jnp.right_shift(byte, 7 - row), 1) == 1
        scale = scales_ref[worker]
        return total + jnp.where(positive, scale, -scale)

    total = jax.lax.fori_loop(0, workers, add, jnp.zeros(shape, jnp.float32))
    new = total / workers + _error(corrected_ref[...], scale_ref[0])
    counts = (column < width) & (row * width + column < size_ref[0])
    new = jnp.where(counts, new, 0.0)
    new_ref[...] = new
    sent_ref[...] = _signs(new[None]).astype(sent_ref.dtype)
    _add_squares(squares_ref, new[None])


def average(
    bits: UInt8[Array, "workers bytes"],
    scales: Float[Array, " workers"],
    corrected: Float[Array, "8 bytes"],
    scale: Float[Array, ""],
    size: Int[Array, ""],
    *,
    interpret: Any = False,
) -> tuple[UInt8[Array, " bytes"], Float[Array, "8 bytes"], Float[Array, ""]]:
    """See ``kernels_pallas.sign_compress.average``; ``interpret`` as in ``pl.pallas_call``."""
    workers, width = bits.shape
    tile = _tile(max(1, workers // 8), width)
    axes = varying_axes(bits, scales, corrected, scale, size)
    block = pl.BlockSpec((8, tile), lambda i: (0, i))
    numbers = pl.BlockSpec(memory_space=pltpu.SMEM)
    moved = workers * width + corrected.size * 8 + width
    sent, new, squares = pl.pallas_call(
        functools.partial(_average_kernel, width=width),
        grid=(pl.cdiv(width, tile),),
        in_specs=[
            numbers,
            numbers,
            numbers,
            pl.BlockSpec((workers, tile), lambda i: (0, i)),
            block,
        ],
        out_specs=[
            pl.BlockSpec((1, tile), lambda i: (0, i)),
            block,
            pl.BlockSpec((8, _LANES), lambda i: (0, 0)),
        ],
        out_shape=[
            result_type((1, width), jnp.uint8, axes),
            result_type(corrected.shape, jnp.float32, axes),
            result_type((8, _LANES), jnp.float32, axes),
        ],
        scratch_shapes=[pltpu.VMEM((workers, tile), jnp.int32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=_VMEM_LIMIT
        ),
        input_output_aliases=_in_place(4, interpret),
        cost_estimate=pl.CostEstimate(
            flops=(5 * workers + 10) * corrected.size, transcendentals=0, bytes_accessed=moved
        ),
        interpret=interpret,
    )(scales, scale.reshape(1), size.reshape(1), bits, corrected)
    return sent[0], new, jnp.sum(squares)
