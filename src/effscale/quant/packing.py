r"""Codes of 4, 2 and 1 bits in bytes.

A row of k codes of b bits takes k b / 8 bytes. It is cut into p = 8 / b *planes* of k / p consecutive codes each, and byte i holds the
i-th code of every plane, the first plane in its lowest bits. So unpacking a plane is one shift of whole bytes, and a product is
the sum of p products of planes: no code has to move to another place, which is what makes packed weights slow elsewhere.

Integers and ternary codes are two's complement; a binary code is 1 where its bit is set and -1 elsewhere. Codes of 3 bits are kept
in 4.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int8

from kernels_pallas import packed_codes


def stored_bits(bits: int) -> int:
    """The bits that a code takes in memory.

    Example:
        >>> [stored_bits(bits) for bits in (1, 2, 3, 4, 8)]
        [1, 2, 4, 4, 8]
    """
    return 4 if bits == 3 else bits


def pack(codes: Int8[Array, "*batch codes"], bits: int) -> Int8[Array, "*batch bytes"]:
    """Codes of ``bits`` bits in bytes.

    Raises:
        ValueError: The last dimension is no multiple of the codes in a byte.

    Example:
        >>> pack(jnp.array([1, -2, 3, 7], jnp.int8), 4).tolist()  # 0x31, 0x7e
        [49, 126]
    """
    bits = stored_bits(bits)
    planes = 8 // bits
    if codes.shape[-1] % planes:
        raise ValueError(
            f"{codes.shape[-1]} codes of {bits} bits do not fill whole bytes: {planes} go into one"
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
    """The planes of codes, first to last.

    Example:
        >>> [plane.tolist() for plane in unpack_planes(jnp.array([49, 126], jnp.int8), 4)]
        [[1, -2], [3, 7]]
    """
    return packed_codes.unpack_planes(packed, stored_bits(bits))


def unpack(packed: Int8[Array, "*batch bytes"], bits: int) -> Int8[Array, "*batch codes"]:
    """The codes, as they were before `pack`."""
    return jnp.concatenate(unpack_planes(packed, bits), axis=-1)


def _mask(bits: int) -> Array:
    return jnp.int8((1 << bits) - 1)
