r"""Pack codes of 4, 2 and 1 bits into bytes.

A row of k codes of b bits takes k b / 8 bytes. It is split into p = 8 / b *planes* of k / p consecutive codes each,
and byte i holds the i-th code of every plane, the first plane in the lowest bits. Unpacking a plane is then one shift
of whole bytes, and a product is the sum of p products of planes. No code has to move to another position, which is
what makes packed weights slow in other layouts.

Integers and ternary codes are in two's complement. A binary code is 1 if its bit is set and -1 otherwise. Codes of 3
bits are stored in 4 bits.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int8

from kernels_pallas import packed_codes


def stored_bits(bits: int) -> int:
    """Return the number of bits that a code takes in memory.

    Example:
        >>> [stored_bits(bits) for bits in (1, 2, 3, 4, 8)]
        [1, 2, 4, 4, 8]
    """
    return 4 if bits == 3 else bits


def pack(codes: Int8[Array, "*batch codes"], bits: int) -> Int8[Array, "*batch bytes"]:
    """Pack codes of ``bits`` bits into bytes.

    Raises:
        ValueError: The last dimension is not a multiple of the number of codes in a byte.

    Example:
        >>> pack(jnp.array([1, -2, 3, 7], jnp.int8), 4).tolist()  # 0x31, 0x7e
        [49, 126]
    """
    bits = stored_bits(bits)
    planes = 8 // bits
    if codes.shape[-1] % planes:
        raise ValueError(
            f"the last dimension must be a multiple of {planes} to fill whole bytes with {bits}-bit codes, got {codes.shape[-1]}"
        )
    if planes == 1:
        return codes
    if bits == 1:
        codes = (codes > 0).astype(jnp.int8)
    width = codes.shape[-1] // planes
    packed = jnp.zeros((*codes.shape[:-1], width), jnp.int8)
    for plane in range(planes):
        part = codes[..., plane * width : (plane + 1) * width] & _mask(bits)
        packed |= part << jnp.int8(plane * bits)
    return packed


def unpack_planes(
    packed: Int8[Array, "*batch bytes"], bits: int
) -> list[Int8[Array, "*batch bytes"]]:
    """Unpack the planes of codes, first to last.

    Example:
        >>> [plane.tolist() for plane in unpack_planes(jnp.array([49, 126], jnp.int8), 4)]
        [[1, -2], [3, 7]]
    """
    return packed_codes.unpack_planes(packed, stored_bits(bits))


def unpack(packed: Int8[Array, "*batch bytes"], bits: int) -> Int8[Array, "*batch codes"]:
    """Unpack the codes; the inverse of ``pack``."""
    return jnp.concatenate(unpack_planes(packed, bits), axis=-1)


def _mask(bits: int) -> Array:
    return jnp.int8((1 << bits) - 1)
