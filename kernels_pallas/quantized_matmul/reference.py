"""Plain jnp: the reference for the kernels, and the fallback if they do not support the operands."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32

from kernels_pallas.packed_codes import unpack_planes

STEPS = 127
"""The largest code of an input; the smallest is its negative, or one less with zero points."""


class Rows(NamedTuple):
    """Inputs as 8-bit codes; ``zero``, the number that the code 0 represents, is None if that is 0."""

    codes: Int8[Array, "rows d_in"]
    scale: Float[Array, " rows"]
    zero: Float[Array, " rows"] | None


def quantize_rows(x: Float[Array, "rows d_in"], *, symmetric: bool) -> Rows:
    """Quantize each row with its own scale, and with a zero point unless ``symmetric``."""
    x = x.astype(jnp.float32)
    if symmetric:
        scale, zero = symmetric_scale(jnp.max(jnp.abs(x), axis=1)), None
    else:
        scale, zero = range_scale(jnp.min(x, axis=1), jnp.max(x, axis=1))
    codes = encode(x, scale[:, None], None if zero is None else zero[:, None])
    return Rows(codes.astype(jnp.int8), scale, zero)


def symmetric_scale(largest: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """Return the scale of rows with these maximum magnitudes; a row of zeros has the scale 1."""
    scale = largest / STEPS
    return jnp.where(scale == 0, 1.0, scale)


def range_scale(
    low: Float[Array, "*rows"], high: Float[Array, "*rows"]
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """Return the scale of rows from ``low`` to ``high``, and what the code 0 represents: a multiple of it, or a constant row's value."""
    scale = (high - low) / (2 * STEPS + 1)
    scale = jnp.where(scale == 0, 1.0, scale)
    return scale, jnp.where(high == low, low, (jnp.round(low / scale) + STEPS + 1) * scale)


def encode(
    x: Float[Array, "..."], scale: Float[Array, "..."], zero: Float[Array, "..."] | None
) -> Float[Array, "..."]:
    """Return the codes of numbers, as floats."""
    if zero is None:
        return jnp.clip(jnp.round(x / scale), -STEPS, STEPS)
    return jnp.clip(jnp.round((x - zero) / scale), -STEPS - 1, STEPS)


def reference(
    x: Float[Array, "rows d_in"],
    weight: Int8[Array, "d_out bytes"],
    scale: Float[Array, " d_out"],
    bias: Float[Array, " d_out"] | None,
    code_sums: Int32[Array, " d_out"] | None = None,
    *,
    bits: int,
    activation: Callable[[Array], Array] | None,
) -> Float[Array, "rows d_out"]:
    """Compute the same as ``kernels_pallas.quantized_matmul``."""
    codes, row_scale, zero = quantize_rows(x, symmetric=code_sums is None)
    width = weight.shape[1]
    sums = jnp.zeros((x.shape[0], weight.shape[0]), jnp.int32)
    for i, plane in enumerate(unpack_planes(weight, bits)):
        part = codes[:, i * width : (i + 1) * width]
        contracting = (((1,), (1,)), ((), ()))
        sums += jax.lax.dot_general(part, plane, contracting, preferred_element_type=jnp.int32)
    y = sums.astype(jnp.float32) * row_scale[:, None]
    if zero is not None and code_sums is not None:
        y += zero[:, None] * code_sums[None].astype(jnp.float32)
    y *= scale[None]
    return finish(y, bias, activation).astype(x.dtype)


def finish(
    y: Float[Array, "rows d_out"],
    bias: Float[Array, "..."] | None,
    activation: Callable[[Array], Array] | None,
) -> Float[Array, "rows d_out"]:
    """Apply the bias, of shape ``(d_out,)`` or ``(1, d_out)``, and the activation, in float32."""
    if bias is not None:
        y = y + bias.reshape(1, -1).astype(jnp.float32)
    return y if activation is None else activation(y)
