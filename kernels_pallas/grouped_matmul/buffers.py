"""The product by a buffer for each group, as long as groups are expected to be, and a loop over what does not fit.

The buffers are one batched product. Groups that are longer have their other rows multiplied a tile at a time; of groups that are even
there are none. A loop over all rows of all groups would take twice as long on a CPU.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul.reference import group_of_rows
from kernels_pallas.manual_axes import vary, varying_axes

LARGEST_TILE = 64
SMALLEST_TILE = 8


def grouped_matmul(
    x: Float[Array, "rows d_in"],
    weight: Float[Array, "groups d_in d_out"],
    sizes: Int[Array, " groups"],
    bias: Float[Array, "groups d_out"] | None = None,
    expected_rows: int | None = None,
) -> Float[Array, "rows d_out"]:
    """See `kernels_pallas.grouped_matmul`."""
    # In a shard_map a gradient has to vary as its operand does.
    x, weight, sizes, bias = vary((x, weight, sizes, bias), varying_axes(x, weight, sizes, bias))
    expected = x.shape[0] if expected_rows is None else expected_rows
    y = _product(x, weight, sizes, math.ceil(expected / weight.shape[0]))
    if bias is not None:
        mine = jax.nn.one_hot(group_of_rows(sizes, x.shape[0]), sizes.shape[0])
        y = y + mine @ bias.astype(jnp.float32)
    return y.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x: Array, weight: Array, sizes: Array, capacity: int) -> Array:
    return _rows_times(x, weight, sizes, capacity, transposed=False)


def _forward(x: Array, weight: Array, sizes: Array, capacity: int) -> tuple[Array, Any]:
    return _product(x, weight, sizes, capacity), (x, weight, sizes)


def _backward(capacity: int, kept: Any, g: Array) -> tuple[Array, Array, None]:
    x, weight, sizes = kept
    g = g.astype(x.dtype)
    to_x = _rows_times(g, weight, sizes, capacity, transposed=True)
    to_weight = _weight_gradient(x, g, sizes, capacity)
    return to_x.astype(x.dtype), to_weight.astype(weight.dtype), None


_product.defvjp(_forward, _backward)


def _rows_times(x: Array, weight: Array, sizes: Array, capacity: int, *, transposed: bool) -> Array:
    """Each row times the matrix of its group, or times its transpose, in float32."""
    rows, groups = x.shape[0], weight.shape[0]
    tile = _tile(capacity)
    contract = 2 if transposed else 1
    product = lambda a, w, batch: jax.lax.dot_general(
        a,
        w,
        (((a.ndim - 1,), (contract - 1 + batch,)), (((0,), (0,)) if batch else ((), ()))),
        preferred_element_type=jnp.float32,
    )
    starts = jnp.cumsum(sizes) - sizes
    buffers = product(x[_buffer_rows(starts, capacity, rows)], weight, 1)

    mine = group_of_rows(sizes, rows)
    group = jnp.minimum(mine, groups - 1)
    place = jnp.arange(rows, dtype=jnp.int32) - starts[group]
    slot = group * capacity + jnp.minimum(place, capacity - 1)
    fits = (mine < groups) & (place < capacity)
    y = jnp.where(fits[:, None], buffers.reshape(groups * capacity, -1)[slot], 0)

    x, y = (jnp.pad(a, ((0, tile), (0, 0))) for a in (x, y))
    group_at, number = _left_over(starts, sizes, capacity, tile)

    def step(t: Array, y: Array) -> Array:
        group, at, left = group_at(t)
        made = product(jax.lax.dynamic_slice_in_dim(x, at, tile), weight[group], 0)
        before = jax.lax.dynamic_slice_in_dim(y, at, tile)
        own = (jnp.arange(tile) < left)[:, None]
        return jax.lax.dynamic_update_slice_in_dim(y, jnp.where(own, made, before), at, 0)

    return jax.lax.fori_loop(jnp.zeros_like(number), number, step, y)[:rows]


def _weight_gradient(x: Array, g: Array, sizes: Array, capacity: int) -> Array:
    """The sum over each group's rows of ``x_r g_r^T``, in float32."""
    rows, tile = x.shape[0], _tile(capacity)
    starts = jnp.cumsum(sizes) - sizes
    at = _buffer_rows(starts, capacity, rows)
    there = (jnp.arange(capacity)[None] < sizes[:, None])[..., None]
    total = jnp.einsum(
        "gri,gro->gio", x[at], jnp.where(there, g[at], 0), preferred_element_type=jnp.float32
    )
    x, g = (jnp.pad(a, ((0, tile), (0, 0))) for a in (x, g))
    group_at, number = _left_over(starts, sizes, capacity, tile)

    def step(t: Array, total: Array) -> Array:
        group, at, left = group_at(t)
        own = (jnp.arange(tile) < left)[:, None]
        there = jnp.where(own, jax.lax.dynamic_slice_in_dim(g, at, tile), 0)
        here = jax.lax.dynamic_slice_in_dim(x, at, tile)
        more = jnp.matmul(here.T, there, preferred_element_type=jnp.float32)
        return total.at[group].add(more)

    return jax.lax.fori_loop(jnp.zeros_like(number), number, step, total)


def _buffer_rows(starts: Array, capacity: int, rows: int) -> Int[Array, "groups capacity"]:
    """The rows in each group's buffer; those after its own are of others, and nobody reads what becomes of them."""
    return jnp.minimum(starts[:, None] + jnp.arange(capacity)[None], rows - 1)


def _left_over(starts: Array, sizes: Array, capacity: int, tile: int) -> Any:
    """From the number of a tile to its group, its first row and how many rows of the group are left; and how many tiles there are."""
    over = jnp.maximum(sizes - capacity, 0)
    tiles = -(-over // tile)
    ends = jnp.cumsum(tiles)

    def group_at(t: Array) -> tuple[Array, Array, Array]:
        group = (t >= ends).sum(dtype=jnp.int32)
        done = (t - (ends - tiles)[group]) * tile
        return group, starts[group] + capacity + done, over[group] - done

    return group_at, ends[-1]


def _tile(capacity: int) -> int:
    """Rows of a tile: an eighth of a buffer's, as a power of two."""
    tile = 1 << max(capacity // 8 - 1, 0).bit_length()
    return min(LARGEST_TILE, max(SMALLEST_TILE, tile))
