"""What fits in the memory of a TPU's core, and so how large the kernels' tiles are."""

from typing import Any

import jax
from jax.experimental import pallas as pl

LIMIT = 56 * 2**20
"""The generations from v5e on have at least 64 MiB."""
_BUDGET = 44 * 2**20
_TOO_OLD = ("TPU v2", "TPU v3", "TPU v4")
LARGEST_TILE = 128
"""Rows of a tile: a matrix unit takes as long to load a weight as to multiply so many."""
_SMALLEST_TILE = 16
# Each has a few numbers in scalar memory.
_MAX_ROWS = 8192


def tile_of_rows(rows: int) -> int:
    """Rows of a tile."""
    return min(LARGEST_TILE, padded(rows, _SMALLEST_TILE))


def padded(size: int, multiple: int) -> int:
    """The next multiple."""
    return pl.cdiv(size, multiple) * multiple


def gather_outputs(tokens: int, d_in: int, rows: int, weights: int, dtype: Any) -> int | None:
    """Outputs of a tile of ``gather_matmul`` with so many weights, the most that fit; None: none do."""
    tile, itemsize, wide = tile_of_rows(rows), dtype.itemsize, padded(d_in, 128)
    inputs = wide * (padded(tokens, 16) * (itemsize + 4) + tile * 4 + padded(rows, tile) * itemsize)

    def rest(outputs: int) -> int:
        streamed = 2 * itemsize * outputs * (weights * wide + tile)
        return streamed + 4 * tile * outputs * (weights + 2)

    return _most(inputs, rest)


def scatter_outputs(tokens: int, rows: int, d_in: int, dtype: Any) -> int | None:
    """Outputs of a tile of ``matmul_scatter``, the most that fit; None: none do."""
    tile, itemsize, wide = tile_of_rows(rows), dtype.itemsize, padded(d_in, 128)

    def rest(outputs: int) -> int:
        streamed = 2 * itemsize * (outputs * wide + outputs * padded(tokens, 16))
        return streamed + 4 * outputs * (padded(tokens, 16) + 2 * tile)

    return _most(2 * tile * wide * itemsize, rest)


def _most(fixed: int, rest: Any) -> int | None:
    fitting = (outputs for outputs in (512, 256, 128) if fixed + rest(outputs) <= _BUDGET)
    return next(fitting, None)


def why_not(rows: int, dtype: Any, outputs: int | None) -> str | None:
    """The reason why the kernels cannot serve so many rows with tiles of so many outputs, or None."""
    if jax.default_backend() == "tpu":
        kind = jax.devices()[0].device_kind
        if kind.startswith(_TOO_OLD):
            return f"{kind} has too little VMEM"
    if dtype not in ("float32", "bfloat16"):
        return f"operands are {dtype}, and it takes float32 and bfloat16"
    if outputs is None:
        return "so many tokens of this width leave no room for a tile of the weight in VMEM"
    return why_not_rows(rows)


def why_not_rows(rows: int) -> str | None:
    """The same, of what rows take in scalar memory."""
    if rows > _MAX_ROWS:
        return f"{rows} rows are more than the {_MAX_ROWS} that scalar memory has room for"
    return None
