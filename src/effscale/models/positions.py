"""Where tokens stand: rotary angles and ALiBi slopes."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effscale.models.config import Rotary
from effscale.models.rotary_scaling import RotaryScaling

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
