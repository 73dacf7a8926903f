"""Codes of 8, 4, 2 and 1 bits packed into bytes, in planes: the memory layout of the weights of ``quantized_matmul`` and ``packed_matmul``.

A row of k codes of b bits is divided into 8 / b planes of consecutive codes. Byte i holds the i-th code of each plane, the
first plane in its lowest bits. Codes are two's complement, except for one bit: 1 if the bit is set, otherwise -1.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8, Int32

from kernels_pallas import dispatch

BITS = (1, 2, 4, 8)
# The compiler of TPU kernels gets what the budget of their tiles leaves of the limit.
VMEM_LIMIT = 56 * 2**20
VMEM_BUDGET = 40 * 2**20


def check_codes(x: Any, weight: Any, bits: int) -> None:
    """Raise a ``ValueError`` unless ``x``, ``(rows, d_in)``, has the inputs of a packed weight; they only need a shape."""
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits}")
    d_in = weight.shape[1] * (8 // bits)
    if x.shape[1] != d_in:
        raise ValueError(
            f"x must have the {d_in} inputs of weight {weight.shape} with {bits}-bit codes, got the shape {x.shape}"
        )


def why_no_kernel(x: Any, weight: Any) -> str | None:
    """Return why no kernel for packed weights can be used here, or None."""
    if 0 in x.shape or 0 in weight.shape:
        return f"x {x.shape} or weight {weight.shape} is empty"
    return dispatch.partitioned()


def unpack_planes(
    packed: Int[Array, "*batch bytes"], bits: int
) -> list[Int[Array, "*batch bytes"]]:
    """Return the planes of codes, first to last.

    Args:
        packed: int8; or int32 of the same numbers, for processors without byte operations.
        bits: Number of bits per code.

    Example:
        >>> import jax.numpy as jnp
        >>> [plane.tolist() for plane in unpack_planes(jnp.array([49, 126], jnp.int8), 4)]
        [[1, -2], [3, 7]]
    """
    number = packed.dtype.type
    if bits == 8:
        return [packed]
    if bits == 1:
        ones = [(packed >> number(plane)) & number(1) for plane in range(8)]
        return [one + one - number(1) for one in ones]
    # Shift left to the highest bits, then right with sign extension.
    top = 8 * packed.dtype.itemsize - bits
    return [(packed << number(top - plane * bits)) >> number(top) for plane in range(8 // bits)]


def unpack_words(words: Int32[Array, "*shape"], bits: int) -> list[Int32[Array, "*shape"]]:
    """Return the planes of codes of four-byte words, for vector units that shift 32 bits but not 8.

    Example:
        >>> import jax.numpy as jnp
        >>> first, second = unpack_words(jnp.array([0x7E31], jnp.int32), 4)
        >>> hex(first.item()), hex(second.item())  # -2 and 1; 7 and 3
        ('0xfe01', '0x703')
    """
    if bits == 8:
        return [words]
    # A code with its sign bit flipped is half of the range above the number that it represents; for one bit, twice the code
    # is one above it.
    half, sign = _bytes(1 << (bits - 1)), _bytes(0x80)
    planes = []
    for plane in range(8 // bits):
        codes = (words >> np.int32(plane * bits)) & _bytes((1 << bits) - 1)
        above = codes + codes if bits == 1 else codes ^ half
        # With the highest bit of each byte set, nothing is borrowed from the next byte.
        planes.append(((above | sign) - half) ^ sign)
    return planes


def planes_of_tile(packed: Int8[Array, "outputs bytes"], bits: int) -> list[Any]:
    """Return the planes of codes of a tile in the memory of a TPU, as int8, in a kernel."""
    from jax.experimental.pallas import tpu as pltpu  # the other platforms do not need it

    if bits == 8:
        return [packed]
    words = pltpu.bitcast(packed, jnp.int32)
    return [pltpu.bitcast(plane, jnp.int8) for plane in unpack_words(words, bits)]


def inputs_of_planes(
    x: Float[Array, "rows d_in"], weight: Int8[Array, "d_out bytes"]
) -> Float[Array, "planes rows bytes"]:
    """Return the inputs of each plane of a weight, each beginning at a whole register."""
    return x.reshape(x.shape[0], -1, weight.shape[1]).transpose(1, 0, 2)


def _bytes(value: int) -> np.int32:
    """Repeat a byte four times."""
    return np.uint32(value * 0x01010101).view(np.int32)
