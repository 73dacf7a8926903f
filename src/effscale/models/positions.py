"""Where tokens stand: rotary angles and ALiBi slopes."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effscale.models.rotary_scaling import RotaryScaling, YarnScaling
from effscale.models.validation import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedPositions:
    """A trained vector for each position, added to the token's."""

    num: int
    """Positions that exist; a longer sequence is an error."""
    offset: int = 0
    """Rows before that of position 0 (OPT: 2)."""

    def __post_init__(self):
        check(self, self.num >= 1, "num", "at least 1")
        check(self, self.offset >= 0, "offset", "0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotates pairs of each query and key by an angle that grows with the position (Su et al., 2021)."""

    dim: int | None = None
    """Leading dimensions of each head that rotate; None: all."""
    base: float = 10000.0
    """Pair ``i`` turns by ``base^(-2i/dim)`` a position."""
    interleaved: bool = False
    """Whether pairs are neighbours ``(2i, 2i+1)`` (GPT-J) or halves ``(i, i + dim/2)`` (NeoX, Llama)."""
    scaling: RotaryScaling | None = None
    """How the frequencies were changed for longer sequences: linear, Llama 3's, YaRN; None: not at all."""

    def __post_init__(self):
        check(
            self,
            self.dim is None or (self.dim > 0 and self.dim % 2 == 0),
            "dim",
            "an even number above 0, or None",
        )
        check(self, 0 < self.base < math.inf, "base", "above 0, and finite")
        if isinstance(self.scaling, YarnScaling):
            check(self, self.base > 1, "base", "above 1 with YarnScaling")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alibi:
    """A bias on the scores that falls with distance, by a slope for each head (Press et al., 2021)."""


Positions = LearnedPositions | Rotary | Alibi | None

Angles = tuple[Float[Array, "rows seq pairs"], Float[Array, "rows seq pairs"]]


def rotary_angles(
    positions: Int[Array, "rows seq"], dim: int, base: float, scaling: RotaryScaling | None = None
) -> Angles:
    """Sine and cosine of ``position * base^(-2i/dim)`` for each pair ``i < dim/2``, in float32.

    With ``scaling``, of the frequencies that it makes of these, and times its amplitude.
    """
    frequencies = base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if scaling is not None:
        frequencies = scaling.scale(frequencies, base)
    angles = (
        positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)[None, None]
    )
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    if scaling is not None and scaling.amplitude != 1.0:
        sin, cos = sin * scaling.amplitude, cos * scaling.amplitude
    return sin, cos


def rotate(
    x: Float[Array, "batch heads seq head_dim"], angles: Angles, rotary: Rotary
) -> Float[Array, "batch heads seq head_dim"]:
    """Turns the leading pairs of each head by their angles; later dimensions pass through.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, equation 34.
    """
    sin, cos = (a[:, None].astype(x.dtype) for a in angles)
    dim = 2 * sin.shape[-1]
    turned, rest = x[..., :dim], x[..., dim:]
    if rotary.interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., : dim // 2], turned[..., dim // 2 :]
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = (
        jnp.stack(pair, -1).reshape(turned.shape)
        if rotary.interleaved
        else jnp.concatenate(pair, -1)
    )
    return jnp.concatenate([turned, rest], -1) if rest.shape[-1] else turned


def alibi_slopes(num_heads: int) -> Float[np.ndarray, "heads"]:
    """One slope a head: powers of ``2^(-8/m)`` for the largest power of two ``m <= num_heads``.

    The heads beyond ``m`` take the odd powers of ``2^(-4/m)``.

    Source: Press et al., "Train Short, Test Long", 2021, section 3 and the authors' rule for other head counts.

    Example:
        >>> [round(float(s), 4) for s in alibi_slopes(4)]
        [0.25, 0.0625, 0.0156, 0.0039]
    """
    m = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 / m * i) for i in range(1, m + 1)]
    slopes += [2 ** (-4 / m * i) for i in range(1, 2 * (num_heads - m), 2)]
    return np.asarray(slopes, np.float32)
