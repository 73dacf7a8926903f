"""The op in plain jnp: the definition, and the fallback on every platform.

Eight elements that are one row apart make one byte: in a block [8, bytes], bit 7 - k of byte j is the sign of
element (k, j). So packing adds up rows, and nothing moves along the lanes of a vector unit.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8


def pack(positive: Bool[Array, "*batch 8 bytes"]) -> UInt8[Array, "*batch bytes"]:
    """Pack eight rows of truth values into one row of bytes."""
    return jnp.sum(positive.astype(jnp.uint8) << _shifts(positive.shape), -2, dtype=jnp.uint8)


def unpack(bits: UInt8[Array, "*batch bytes"]) -> Bool[Array, "*batch 8 bytes"]:
    """Invert ``pack``."""
    shape = (*bits.shape[:-1], 8, bits.shape[-1])
    rows = jnp.broadcast_to(bits[..., None, :], shape)
    return (rows >> _shifts(shape)) & jnp.uint8(1) == 1


def _shifts(shape: tuple[int, ...]) -> UInt8[Array, "*batch 8 bytes"]:
    return jnp.uint8(7) - jax.lax.broadcasted_iota(jnp.uint8, shape, len(shape) - 2)


def quantized(x: Float[Array, "*shape"], scale: Float[Array, "..."]) -> Float[Array, "*shape"]:
    """Return what is sent for x: the scale with the sign of x; the sign of zero is positive."""
    return jnp.where(x >= 0, scale, -scale)


def compress(
    x: Float[Array, "servers 8 bytes"],
    corrected: Float[Array, "servers 8 bytes"],
    scale: Float[Array, ""],
    *,
    size: int,
) -> tuple[UInt8[Array, "servers bytes"], Float[Array, "servers 8 bytes"], Float[Array, ""]]:
    """See ``kernels_pallas.sign_compress.compress``."""
    corrected = x.astype(jnp.float32) + (corrected - quantized(corrected, scale))
    if size < x.size:
        positions = jnp.arange(x.size, dtype=jnp.int32).reshape(x.shape)
        corrected = jnp.where(positions < size, corrected, 0.0)
    return pack(corrected >= 0), corrected, jnp.sum(jnp.square(corrected))


def average(
    bits: UInt8[Array, "workers bytes"],
    scales: Float[Array, " workers"],
    corrected: Float[Array, "8 bytes"],
    scale: Float[Array, ""],
    size: Int[Array, ""],
) -> tuple[UInt8[Array, " bytes"], Float[Array, "8 bytes"], Float[Array, ""]]:
    """See ``kernels_pallas.sign_compress.average``."""
    sent = lambda worker: _expanded(bits[worker], scales[worker])
    # One worker at a time: XLA's CPU compiler makes scalar code of a reduction over workers, which takes forty times as long.
    workers = bits.shape[0]
    total = jax.lax.fori_loop(
        1, workers, lambda worker, total: total + sent(worker), sent(0), unroll=16
    )
    corrected = total / workers + (corrected - quantized(corrected, scale))
    positions = jnp.arange(corrected.size, dtype=jnp.int32).reshape(corrected.shape)
    corrected = jnp.where(positions < size, corrected, 0.0)
    return pack(corrected >= 0), corrected, jnp.sum(jnp.square(corrected))


def expand(
    bits: UInt8[Array, "workers bytes"], scales: Float[Array, " workers"]
) -> Float[Array, "workers 8 bytes"]:
    """See ``kernels_pallas.sign_compress.expand``."""
    return _expanded(bits, scales[:, None, None])


def _expanded(bits: UInt8[Array, "*batch bytes"], scale: Float[Array, "..."]) -> Any:
    return jnp.where(unpack(bits), scale, -scale)
