"""What fits in the memory of a TPU core, which determines the tile sizes of the kernels."""

from typing import Any

from jax.experimental import pallas as pl

from kernels_pallas import dispatch

LIMIT = 56 * 2**20
"""v5e and later generations have at least 64 MiB."""
_BUDGET = 44 * 2**20
LARGEST_TILE = 128
"""Rows per tile: loading a weight takes a matrix unit as long as multiplying this many rows."""
_SMALLEST_TILE = 16
# Each row needs a few numbers in scalar memory.
_MAX_ROWS = 8192


def tile_of_rows(rows: int) -> int:
    """Return the number of rows per tile."""
    return min(LARGEST_TILE, padded(rows, _SMALLEST_TILE))


def padded(size: int, multiple: int) -> int:
    """Round up to a multiple."""
    return pl.cdiv(size, multiple) * multiple


def gather_outputs(tokens: int, d_in: int, rows: int, weights: int, dtype: Any) -> int | None:
    """Return the maximum number of outputs per tile of ``gather_matmul`` with this many weights; None: none fit."""
    tile, itemsize, wide = tile_of_rows(rows), dtype.itemsize, padded(d_in, 128)
    inputs = wide * (padded(tokens, 16) * (itemsize + 4) + tile * 4 + padded(rows, tile) * itemsize)

    def rest(outputs: int) -> int:
        streamed = 2 * itemsize * outputs * (weights * wide + tile)
        return streamed + 4 * tile * outputs * (weights + 2)

    return _most(inputs, rest)


def scatter_outputs(tokens: int, rows: int, d_in: int, dtype: Any) -> int | None:
    """Return the maximum number of outputs per tile of ``matmul_scatter``; None: none fit."""
    tile, itemsize, wide = tile_of_rows(rows), dtype.itemsize, padded(d_in, 128)

    def rest(outputs: int) -> int:
        streamed = 2 * itemsize * (outputs * wide + outputs * padded(tokens, 16))
        return streamed + 4 * outputs * (padded(tokens, 16) + 2 * tile)

    return _most(2 * tile * wide * itemsize, rest)


def _most(fixed: int, rest: Any) -> int | None:
    fitting = (outputs for outputs in (512, 256, 128) if fixed + rest(outputs) <= _BUDGET)
    return next(fitting, None)


def why_not(rows: int, dtype: Any, outputs: int | None) -> str | None:
    """Return why the kernels do not support this many rows and outputs per tile, or None."""
    if reason := dispatch.small_vmem():
        return reason
    if dtype not in ("float32", "bfloat16"):
        return f"operands are {dtype}, and the kernel supports float32 and bfloat16"
    if outputs is None:
        return "this many tokens of this width leave no room for a tile of the weight in VMEM"
    return why_not_rows(rows)


def why_not_rows(rows: int) -> str | None:
    """Return why the rows do not fit in scalar memory, or None."""
    if rows > _MAX_ROWS:
        return f"{rows} rows are more than the {_MAX_ROWS} that fit in scalar memory"
    return None
