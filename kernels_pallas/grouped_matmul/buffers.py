"""The product with one buffer for the even share of each group, and a loop over rows that do not fit."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul.places import Places
from kernels_pallas.grouped_matmul.reference import group_of_rows
from kernels_pallas.manual_axes import vary, varying_axes


def grouped_matmul(
    x: Float[Array, "rows d_in"],
    weight: Float[Array, "groups d_in d_out"],
    sizes: Int[Array, " groups"],
    bias: Float[Array, "groups d_out"] | None = None,
) -> Float[Array, "rows d_out"]:
    """See ``kernels_pallas.grouped_matmul``."""
    # In a shard_map, a gradient must vary like its operand.
    x, weight, sizes, bias = vary((x, weight, sizes, bias), varying_axes(x, weight, sizes, bias))
    y = _product(x, weight, sizes, math.ceil(x.shape[0] / weight.shape[0]))
    if bias is not None:
        mine = jax.nn.one_hot(group_of_rows(sizes, x.shape[0]), sizes.shape[0])
        y = y + mine @ bias.astype(jnp.float32)
    return y.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x: Array, weight: Array, sizes: Array, share: int) -> Array:
    return _rows_times(x, weight, sizes, share, transposed=False)


def _forward(x: Array, weight: Array, sizes: Array, share: int) -> tuple[Array, Any]:
    return _product(x, weight, sizes, share), (x, weight, sizes)


def _backward(share: int, kept: Any, g: Array) -> tuple[Array, Array, None]:
    x, weight, sizes = kept
    g = g.astype(x.dtype)
    to_x = _rows_times(g, weight, sizes, share, transposed=True)
    to_weight = _weight_gradient(x, g, sizes, share)
    return to_x.astype(x.dtype), to_weight.astype(weight.dtype), None


_product.defvjp(_forward, _backward)


def _rows_times(x: Array, weight: Array, sizes: Array, share: int, *, transposed: bool) -> Array:
    """Multiply each row by the matrix of its group, or by its transpose, in float32."""
    places = Places(sizes, x.shape[0], share)
    contract = 2 if transposed else 1
    product = lambda a, w, batch: jax.lax.dot_general(
        a,
        w,
        (((a.ndim - 1,), (contract - 1 + batch,)), (((0,), (0,)) if batch else ((), ()))),
        preferred_element_type=jnp.float32,
    )
    padded = places.pad(x)

    def step(tile: Array, y: Array) -> Array:
        group, at, own = places.tile(tile)
        return places.put(y, product(places.cut(padded, at, own), weight[group], 0), at, own)

    y = places.rows(product(places.buffers(x), weight, 1))
    return places.loop(step, places.pad(y))[: x.shape[0]]


def _weight_gradient(x: Array, g: Array, sizes: Array, share: int) -> Array:
    """Return the sum of ``x_r g_r^T`` over the rows of each group, in float32."""
    places = Places(sizes, x.shape[0], share)
    product = {"preferred_element_type": jnp.float32}
    total = jnp.einsum("gri,gro->gio", places.buffers(x), places.buffers(g), **product)
    padded_x, padded_g = places.pad(x), places.pad(g)

    def step(tile: Array, total: Array) -> Array:
        group, at, own = places.tile(tile)
        here, there = places.cut(padded_x, at, own), places.cut(padded_g, at, own)
        return total.at[group].add(jnp.matmul(here.T, there, **product))

    return places.loop(step, total)
