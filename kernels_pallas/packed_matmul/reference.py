"""Plain jnp: the reference for the kernels, and the fallback if they do not support the operands."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from kernels_pallas.packed_codes import unpack_planes
from kernels_pallas.quantized_matmul.reference import finish


def values(
    weight: Int8[Array, "d_out bytes"],
    scale: Float[Array, "groups d_out"],
    zero: Float[Array, "groups d_out"] | None,
    bits: int,
) -> Float[Array, "d_out d_in"]:
    """Return the numbers that the codes represent, in float32."""
    codes = jnp.concatenate(unpack_planes(weight, bits), axis=1).astype(jnp.float32)
    grouped = codes.reshape(weight.shape[0], scale.shape[0], -1) * scale.T[:, :, None]
    if zero is not None:
        grouped = grouped + zero.T[:, :, None]
    return grouped.reshape(codes.shape)


def reference(
    x: Float[Array, "rows d_in"],
    weight: Int8[Array, "d_out bytes"],
    scale: Float[Array, "groups d_out"],
    zero: Float[Array, "groups d_out"] | None,
    bias: Float[Array, " d_out"] | None,
    *,
    bits: int,
    activation: Callable[[Array], Array] | None,
) -> Float[Array, "rows d_out"]:
    """Compute the same as ``kernels_pallas.packed_matmul``."""
    kernel = values(weight, scale, zero, bits).astype(x.dtype)
    y = jnp.einsum("ti,oi->to", x, kernel, preferred_element_type=jnp.float32)
    return finish(y, bias, activation).astype(x.dtype)
