"""Mosaic GPU kernels for Hopper: a warpgroup processes a tile of columns, one of its eight rows after another.

The eight signs of a byte are in the same thread, so packing needs no exchange between threads.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, UInt8

from kernels_pallas.manual_axes import result_type, vary, varying_axes

# Columns per tile: what 128 threads hold of a row in loads of 16 bytes.
_TILE = 512
_ALIGNED = 16


def why_not(width: int) -> str | None:
    """Return why the kernels do not support rows of this many bytes, or None."""
    if width < _TILE or width % _ALIGNED:
        return f"rows have {width} bytes of signs, and the kernel needs at least {_TILE}, and a multiple of {_ALIGNED}"
    return None


def _columns(width: int) -> tuple[Any, Any, Any]:
    """Return the first column of this block's tile, its columns, and which of them belong to no other block.

    The last tile overlaps the one before it, so that each is whole; both write the same values there.
    """
    tile = jax.lax.axis_index("tile")
    first = jnp.minimum(tile * _TILE, width - _TILE)
    layout = plgpu.Layout.WG_STRIDED((_TILE,), vec_size=4)
    columns = first + plgpu.broadcasted_iota(jnp.int32, (_TILE,), 0, layout=layout)
    return first, columns, columns >= tile * _TILE


def _load(ref: Any, index: tuple[Any, ...], first: Any) -> Any:
    layout = plgpu.Layout.WG_STRIDED((_TILE,), vec_size=4)
    return plgpu.layout_cast(ref[*index, pl.ds(first, _TILE)], layout)


def _zeros(dtype: Any) -> Any:
    layout = plgpu.Layout.WG_STRIDED((_TILE,), vec_size=4)
    return plgpu.layout_cast(jnp.full((_TILE,), 0, dtype), layout)


def _error(corrected: Any, scale: Any) -> Any:
    return corrected - jnp.where(corrected >= 0, scale, -scale)


def _compress_kernel(
    x_ref, corrected_ref, scale_ref, bits_ref, new_ref, squares_ref, *, size, width
):
    server = jax.lax.axis_index("server")
    first, columns, own = _columns(width)
    scale = scale_ref[0]
    whole, rest = divmod(size, width)
    byte, squares = _zeros(jnp.int32), _zeros(jnp.float32)
    for k in range(8):
        row = 8 * server + k
        # Positions row * width + column below size, compared by row because the product may not fit in 32 bits.
        end = jnp.where(row < whole, width, jnp.where(row == whole, rest, 0))
        x = _load(x_ref, (server, k), first).astype(jnp.float32)
        new = x + _error(_load(corrected_ref, (server, k), first), scale)
        new = jnp.where(columns < end, new, 0.0)
        new_ref[server, k, pl.ds(first, _TILE)] = new
        byte = byte + jnp.where(new >= 0, 1 << (7 - k), 0)
        squares = squares + jnp.where(own, new * new, 0.0)
    bits_ref[server, pl.ds(first, _TILE)] = byte.astype(jnp.uint8)
    squares_ref[server, jax.lax.axis_index("tile")] = jnp.sum(squares)


def compress(
    x: Float[Array, "servers 8 bytes"],
    corrected: Float[Array, "servers 8 bytes"],
    scale: Float[Array, ""],
    *,
    size: int,
    interpret: Any = None,
) -> tuple[UInt8[Array, "servers bytes"], Float[Array, "servers 8 bytes"], Float[Array, ""]]:
    """See ``kernels_pallas.sign_compress.compress``; ``interpret`` as in ``plgpu.kernel``."""
    servers, _, width = x.shape
    axes, tiles = varying_axes(x, corrected, scale), pl.cdiv(width, _TILE)
    bits, new, squares = plgpu.kernel(
        functools.partial(_compress_kernel, size=size, width=width),
        out_type=[
            result_type((servers, width), jnp.uint8, axes),
            result_type(x.shape, jnp.float32, axes),
            result_type((servers, tiles), jnp.float32, axes),
        ],
        grid=(servers, tiles),
        grid_names=("server", "tile"),
        interpret=interpret,
    )(x, corrected, scale.reshape(1))
    # The result of a Mosaic GPU kernel lacks the axes of its declared type.
    return vary((bits, new, jnp.sum(squares)), axes)


def _average_kernel(
    bits_ref,
    scales_ref,
    corrected_ref,
    scale_ref,
    size_ref,
    sent_ref,
    new_ref,
    squares_ref,
    *,
    width,
    workers,
):
    first, columns, own = _columns(width)
    scale, size = scale_ref[0], size_ref[0]

    def add(worker, totals):
        byte = _load(bits_ref, (worker,), first).astype(jnp.int32)
        weight = scales_ref[worker]
        return tuple(
            total + jnp.where((byte >> (7 - k)) & 1 == 1, weight, -weight)
            for k, total in enumerate(totals)
        )

    totals = jax.lax.fori_loop(0, workers, add, (_zeros(jnp.float32),) * 8)
    byte, squares = _zeros(jnp.int32), _zeros(jnp.float32)
    for k, total in enumerate(totals):
        new = total / workers + _error(_load(corrected_ref, (k,), first), scale)
        new = jnp.where(columns + k * width < size, new, 0.0)
        new_ref[k, pl.ds(first, _TILE)] = new
        byte = byte + jnp.where(new >= 0, 1 << (7 - k), 0)
        squares = squares + jnp.where(own, new * new, 0.0)
    sent_ref[pl.ds(first, _TILE)] = byte.astype(jnp.uint8)
    squares_ref[jax.lax.axis_index("tile")] = jnp.sum(squares)


def average(
    bits: UInt8[Array, "workers bytes"],
    scales: Float[Array, " workers"],
    corrected: Float[Array, "8 bytes"],
    scale: Float[Array, ""],
    size: Int[Array, ""],
    *,
    interpret: Any = None,
) -> tuple[UInt8[Array, " bytes"], Float[Array, "8 bytes"], Float[Array, ""]]:
    """See ``kernels_pallas.sign_compress.average``; ``interpret`` as in ``plgpu.kernel``."""
    workers, width = bits.shape
    axes, tiles = varying_axes(bits, scales, corrected, scale, size), pl.cdiv(width, _TILE)
    sent, new, squares = plgpu.kernel(
        functools.partial(_average_kernel, width=width, workers=workers),
        out_type=[
            result_type((width,), jnp.uint8, axes),
            result_type(corrected.shape, jnp.float32, axes),
            result_type((tiles,), jnp.float32, axes),
        ],
        grid=(tiles,),
        grid_names=("tile",),
        interpret=interpret,
    )(bits, scales, corrected, scale.reshape(1), size.reshape(1))
    return vary((sent, new, jnp.sum(squares)), axes)
