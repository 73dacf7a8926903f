"""Quantization formats: how many bits, how codes are spread over the range, and which values share a scale; and codes of fewer than 8 bits in bytes."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Int8

from effscale.options import Options, PositiveInt, check
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


Granularity = Literal["tensor", "channel", "group", "block", "token"]
"""Which values of a matrix share a scale.

For a weight of shape ``(..., in, out)``: ``tensor``, the whole matrix; ``channel``, the ``in`` values of one output;
``group``, ``group_size`` consecutive values of one output; ``block``, all values of ``out / num_blocks`` consecutive
outputs, which DeepSpeed and the ZeroQuant paper call a group. For activations of shape ``(..., features)``:
``token``, the features of one token.
"""

Spread = Literal["paper", "narrow", "centered"]
r"""How the scale of b-bit integers is computed from the values of a group, with m their largest magnitude.

``paper``, used by DeepSpeed: $m / 2^{b-1}$, codes from $-2^{b-1}$ to $2^{b-1} - 1$, so the value m is clipped to the
largest code; asymmetric: $(\max - \min) / 2^b$. ``narrow``, the most common: $m / (2^{b-1} - 1)$, the same number of
codes of either sign, so nothing is clipped and one code is unused. ``centered``, used by compressed-tensors:
$m / (2^{b-1} - \tfrac12)$ with the codes of ``paper``. For asymmetric formats, the latter two use
$(\max - \min) / (2^b - 1)$.
"""

_BITS = (1, 2, 3, 4, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format(Options):
    """A quantization format.

    An invalid value raises a ``ValueError`` that names the field.

    Example:
        >>> Format(bits=4, granularity="group", group_size=32).describe()
        'int4, symmetric, in groups of 32'
    """

    bits: int = 8
    """Bits per value: 8, 4 or 3 for evenly spaced integers, 2 for ternary values (plus, zero, minus), 1 for binary
    values."""
    floating: bool = False
    """Use 8-bit floating point (e4m3: 4 exponent bits, 3 mantissa bits) instead of integers."""
    symmetric: bool = True
    """Whether the range is symmetric around zero. Otherwise each group has a scale and a zero point, which suits
    values of one sign."""
    granularity: Granularity = "channel"
    """Which values share a scale."""
    group_size: PositiveInt | None = None
    """Number of values per group along the input dimension, for ``granularity="group"``; must divide that dimension."""
    num_blocks: PositiveInt | None = None
    """Number of blocks of outputs, for ``granularity="block"``; must divide the output dimension."""
    spread: Spread = "narrow"
    """How integers are spread over the range of the values; see ``Spread``."""
    integer_zero: bool = True
    """Whether the zero point of asymmetric integers is an integer multiple of the scale, as in DeepSpeed; otherwise
    it is the smallest value itself."""

    def __post_init__(self):
        super().__post_init__()
        check(self, self.bits in _BITS, "bits", f"one of {', '.join(map(str, _BITS))}")
        check(self, self.bits == 8 or not self.floating, "floating", "False for less than 8 bits")
        uniform = self.bits > 2 and not self.floating
        check(self, self.symmetric or uniform, "symmetric", f"True for {self.kind}")
        for field, granularity in (("group_size", "group"), ("num_blocks", "block")):
            given, needed = getattr(self, field) is not None, self.granularity == granularity
            check(self, given or not needed, field, f"at least 1 with granularity={granularity!r}")
            check(self, needed or not given, field, f"None unless granularity={granularity!r}")

    @property
    def kind(self) -> str:
        """``int8``, ``int4``, ``int3``, ``ternary``, ``binary`` or ``float8``."""
        if self.floating:
            return "float8"
        return {1: "binary", 2: "ternary"}.get(self.bits, f"int{self.bits}")

    def describe(self) -> str:
        """Return a description for messages and tables."""
        words = [self.kind]
        if self.bits > 2 and not self.floating:
            words.append("symmetric" if self.symmetric else "asymmetric")
        places = {
            "tensor": "per tensor",
            "channel": "per channel",
            "token": "per token",
            "group": f"in groups of {self.group_size}",
            "block": f"in {self.num_blocks} blocks of outputs",
        }
        return ", ".join([*words, places[self.granularity]])
