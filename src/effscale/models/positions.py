"""Position encodings: learned embeddings, rotary angles and ALiBi slopes."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effscale.models.rotary_scaling import RotaryScaling, YarnScaling
from effscale.options import NonNegativeInt, Options, PositiveFloat, PositiveInt, check


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedPositions(Options):
    """A learned vector for each position, added to the token embedding."""

    num: PositiveInt
    """Number of positions; a longer sequence is an error."""
    offset: NonNegativeInt = 0
    """Number of rows before that of position 0 (OPT: 2)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary(Options):
    """Rotary positions: rotate pairs of each query and key by an angle proportional to the position.

    References:
        Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).
            https://arxiv.org/abs/2104.09864
    """

    dim: PositiveInt | None = None
    """Number of leading dimensions of each head to rotate; None: all."""
    base: PositiveFloat = 10000.0
    """Base of the frequencies: pair ``i`` rotates by ``base^(-2i/dim)`` per position."""
    interleaved: bool = False
    """Whether pairs are adjacent, ``(2i, 2i+1)`` (GPT-J), or in two halves, ``(i, i + dim/2)`` (NeoX, Llama)."""
    scaling: RotaryScaling | None = None
    """Scaling of the frequencies for longer sequences: linear, Llama 3's or YaRN; None: no scaling."""

    def __post_init__(self):
        super().__post_init__()
        check(self, self.dim is None or self.dim % 2 == 0, "dim", "an even number, or None")
        if isinstance(self.scaling, YarnScaling):
            check(self, self.base > 1, "base", "above 1 with YarnScaling")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alibi:
    """ALiBi: a bias on the scores that decreases with distance, with a slope for each head.

    References:
        Press et al., "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation" (2021).
            https://arxiv.org/abs/2108.12409
    """


Positions = LearnedPositions | Rotary | Alibi | None

Angles = tuple[Float[Array, "rows seq pairs"], Float[Array, "rows seq pairs"]]


def rotary_angles(
    positions: Int[Array, "rows seq"], dim: int, base: float, scaling: RotaryScaling | None = None
) -> Angles:
    """Return sine and cosine of ``position * base^(-2i/dim)`` for each pair ``i < dim/2``, in float32.

    With ``scaling``, the frequencies are scaled first and the results are multiplied by its amplitude.
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
    """Rotate the leading pairs of each head by their angles; later dimensions are unchanged.

    References:
        Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), equation 34.
            https://arxiv.org/abs/2104.09864
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
    """Return one slope per head: powers of ``2^(-8/m)`` for the largest power of two ``m <= num_heads``.

    Heads beyond ``m`` use the odd powers of ``2^(-4/m)``, the authors' rule for other numbers of heads.

    References:
        Press et al., "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation" (2021),
            section 3. https://arxiv.org/abs/2108.12409

    Example:
        >>> [round(float(s), 4) for s in alibi_slopes(4)]
        [0.25, 0.0625, 0.0156, 0.0039]
    """
    m = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 / m * i) for i in range(1, m + 1)]
    slopes += [2 ** (-4 / m * i) for i in range(1, 2 * (num_heads - m), 2)]
    return np.asarray(slopes, np.float32)
