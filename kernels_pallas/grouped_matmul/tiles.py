"""The product a tile of rows at a time: one loop over groups, and in it one over the group's tiles.

It reads each matrix once and computes little more than the rows that are there. Rows of a group's last tile that belong to
the next group are overwritten when their turn comes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.manual_axes import vary, varying_axes

LARGEST_TILE = 128
SMALLEST_TILE = 8


def grouped_matmul(
    x: Float[Array, "rows d_in"],
    weight: Float[Array, "groups d_in d_out"],
    sizes: Int[Array, " groups"],
    bias: Float[Array, "groups d_out"] | None = None,
) -> Float[Array, "rows d_out"]:
    """See `kernels_pallas.grouped_matmul`."""
    # In a shard_map a gradient has to vary as its operand does.
    return _tiled(*vary((x, weight, sizes, bias), varying_axes(x, weight, sizes, bias)))


@jax.custom_vjp
def _tiled(x: Array, weight: Array, sizes: Array, bias: Array | None) -> Array:
    rows, groups, d_out = x.shape[0], weight.shape[0], weight.shape[2]
    tile = _tile(rows, groups)
    x = jnp.pad(x, ((0, tile), (0, 0)))
    axes = varying_axes(x, weight, sizes, bias)

    def group(y: Array, one: Any) -> tuple[Array, None]:
        w, b, start, size = one

        def step(i: Array, y: Array) -> Array:
            at = start + i * tile
            product = jnp.matmul(
                jax.lax.dynamic_slice_in_dim(x, at, tile), w, preferred_element_type=jnp.float32
            )
            product = product if b is None else product + b.astype(jnp.float32)[None]
            return jax.lax.dynamic_update_slice_in_dim(y, product.astype(y.dtype), at, 0)

        return jax.lax.fori_loop(jnp.zeros_like(size), -(-size // tile), step, y), None

    y = vary(jnp.zeros((rows + tile, d_out), x.dtype), axes)
    y, _ = jax.lax.scan(group, y, (weight, bias, *_starts_and_sizes(sizes, axes)))
    return jnp.where(jnp.arange(rows)[:, None] < sizes.sum(), y[:rows], 0)


def _forward(x: Array, weight: Array, sizes: Array, bias: Array | None) -> tuple[Array, Any]:
    return _tiled(x, weight, sizes, bias), (x, weight, sizes, bias)


def _backward(kept: Any, g: Array) -> tuple[Array, Array, None, Array | None]:
    x, weight, sizes, bias = kept
    rows, groups = x.shape[0], weight.shape[0]
    tile = _tile(rows, groups)
    axes = varying_axes(x, weight, sizes, bias, g)
    x_padded, g_padded = (jnp.pad(a, ((0, tile), (0, 0))) for a in (x, g))

    def group(_: None, one: Any) -> tuple[None, tuple[Array, Array]]:
        start, size = one

        def step(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            at = start + i * tile
            mine = (jnp.arange(tile, dtype=size.dtype) + i * tile < size)[:, None]
            there = jnp.where(mine, jax.lax.dynamic_slice_in_dim(g_padded, at, tile), 0)
            here = jax.lax.dynamic_slice_in_dim(x_padded, at, tile)
            product = jnp.matmul(here.T, there, preferred_element_type=jnp.float32)
            return sums[0] + product, sums[1] + there.astype(jnp.float32).sum(0)

        zeros = (jnp.zeros(weight.shape[1:]), jnp.zeros(weight.shape[2]))
        tiles = -(-size // tile)
        return None, jax.lax.fori_loop(jnp.zeros_like(size), tiles, step, vary(zeros, axes))

    _, (to_weight, to_bias) = jax.lax.scan(group, None, _starts_and_sizes(sizes, axes))
    to_x = _tiled(g, weight.mT, sizes, None)
    as_bias = None if bias is None else to_bias.astype(bias.dtype)
    return to_x.astype(x.dtype), to_weight.astype(weight.dtype), None, as_bias


_tiled.defvjp(_forward, _backward)


def _starts_and_sizes(sizes: Array, axes: frozenset[str]) -> tuple[Array, Array]:
    return vary((jnp.cumsum(sizes) - sizes, sizes), axes)


def _tile(rows: int, groups: int) -> int:
    """Rows of a tile: a quarter of what a group has on average, as a power of two."""
    share = max(1, rows // groups // 4)
    return min(LARGEST_TILE, max(SMALLEST_TILE, 1 << (share - 1).bit_length()))
