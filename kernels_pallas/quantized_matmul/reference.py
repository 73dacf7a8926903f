"""Plain jnp: what the kernels are compared with, and what serves where they do not."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from kernels_pallas.packed_codes import unpack_planes

STEPS = 127
"""The largest code of an input; the smallest is its negative."""


def quantize_rows(
    x: Float[Array, "rows d_in"],
) -> tuple[Int8[Array, "rows d_in"], Float[Array, " rows"]]:
    """Codes of 8 bits, and the scale of each row; that of a row of zeros is one."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=1) / STEPS
    scale = jnp.where(scale == 0, 1.0, scale)
    codes = jnp.clip(jnp.round(x / scale[:, None]), -STEPS, STEPS)
    return codes.astype(jnp.int8), scale


def reference(
    x: Float[Array, "rows d_in"],
    weight: Int8[Array, "d_out bytes"],
    scale: Float[Array, " d_out"],
    bias: Float[Array, " d_out"] | None,
    *,
    bits: int,
    activation: Callable[[Array], Array] | None,
) -> Float[Array, "rows d_out"]:
    """See `kernels_pallas.quantized_matmul`."""
    codes, row_scale = quantize_rows(x)
    width = weight.shape[1]
    sums = jnp.zeros((x.shape[0], weight.shape[0]), jnp.int32)
    for i, plane in enumerate(unpack_planes(weight, bits)):
        part = codes[:, i * width : (i + 1) * width]
        contracting = (((1,), (1,)), ((), ()))
        sums += jax.lax.dot_general(part, plane, contracting, preferred_element_type=jnp.int32)
    y = sums.astype(jnp.float32) * row_scale[:, None] * scale[None]
    return finish(y, bias, activation).astype(x.dtype)


def finish(
    y: Float[Array, "rows d_out"],
    bias: Float[Array, "..."] | None,
    activation: Callable[[Array], Array] | None,
) -> Float[Array, "rows d_out"]:
    """The bias, of shape ``(d_out,)`` or ``(1, d_out)``, and the activation, in float32."""
    if bias is not None:
        y = y + bias.reshape(1, -1).astype(jnp.float32)
    return y if activation is None else activation(y)
