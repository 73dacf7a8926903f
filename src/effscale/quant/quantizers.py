r"""Quantizers: convert real numbers to codes with scales, and back.

With s the scale of a group, b the number of bits, and m the largest magnitude in the group, a value x becomes

$$
\begin{aligned}
\mathrm{symmetric:}\quad & q = \mathrm{clip}(\mathrm{round}(x / s)), \qquad \hat x = s q \\
\mathrm{asymmetric:}\quad & q = \mathrm{clip}(\mathrm{round}((x - z) / s)), \qquad \hat x = s q + z,
\quad s = (\max - \min) / (2^b - 1), \quad z = s \, \mathrm{round}(\min / s) \\
\mathrm{ternary:}\quad & \Delta = 0.7 \, \mathrm{mean} |x|, \quad s = \mathrm{mean}_{|x| > \Delta} |x|, \quad
q = \mathrm{sign}(x) \, [\, |x| > \Delta \,] \\
\mathrm{binary:}\quad & s = \mathrm{mean} |x|, \quad q = \mathrm{sign}(x) \ \mathrm{with}\ \mathrm{sign}(0) = 1
\end{aligned}
$$

In storage, codes of asymmetric formats are signed too: smaller by $2^{b-1}$, with the zero point larger by
$2^{b-1} s$. For other ways to spread codes over a range, see ``effscale.quant.formats.Spread``.

References:
    Yao et al., "ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers" (2022).
        https://arxiv.org/abs/2206.01861
    Wu et al., "XTC: Extreme Compression for Pre-trained Transformers Made Simple and Efficient" (2022).
        https://arxiv.org/abs/2206.01859
"""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from effscale.quant.formats import Format

FLOAT8 = jnp.float8_e4m3fn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # JAX makes it of shapes, shardings and placeholders, too
class Quantized:
    """Quantized values: codes, and the scales that convert them back.

    Attributes:
        codes: int8 (float8 for a floating format), in the shape of the values.
        scale: float32, one per group of values, of shape ``scale_shape``.
        zero: float32, same shape as ``scale``: the offset to add; None for symmetric formats.
        format: The format of the codes.
    """

    codes: Shaped[Array, "*shape"]
    scale: Float[Array, "*groups"]
    zero: Float[Array, "*groups"] | None
    format: Format = dataclasses.field(metadata={"static": True})

    def values(self) -> Float[Array, "*shape"]:
        """Return the values that the codes represent, in float32."""
        axes = AXES[self.format.granularity]
        codes = self.codes.reshape(grouped_shape(self.codes.shape, self.format))
        values = codes.astype(jnp.float32) * jnp.expand_dims(self.scale, axes)
        if self.zero is not None:
            values = values + jnp.expand_dims(self.zero, axes)
        return values.reshape(self.codes.shape)


def quantize(
    x: Float[Array, "*shape"], format: Format, *, key: PRNGKeyArray | None = None
) -> Quantized:
    """Quantize an array.

    A group of zeros, whose scale would be zero, is restored as zeros. In asymmetric formats, a group of equal values
    is restored exactly. A group that contains a NaN or an infinity gets a scale that is not finite, so that the
    problem stays visible.

    Args:
        x: Values to quantize, with at least two dimensions; granularity ``token`` needs only one.
        format: The format to quantize to.
        key: If given, round stochastically: up with the probability of the fraction, so that the expected value is
            the value itself. None rounds to the nearest code, half to even. Binary and ternary codes are not rounded
            and take no key.

    Returns:
        The codes with their scales.

    Raises:
        ValueError: The format does not match the shape, or takes no key.

    Example:
        >>> format = Format(bits=4, granularity="tensor", spread="paper")
        >>> x = jnp.array([[-1.0, -0.5, 0.0], [0.25, 0.9, 1.0]])
        >>> quantize(x, format).values().tolist()
        [[-1.0, -0.5, 0.0], [0.25, 0.875, 0.875]]

    References:
        Yao et al., "ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers"
            (2022). https://arxiv.org/abs/2206.01861
        Wu et al., "XTC: Extreme Compression for Pre-trained Transformers Made Simple and Efficient" (2022).
            https://arxiv.org/abs/2206.01859
    """
    if key is not None and (format.bits <= 2 or format.floating):
        raise ValueError(f"key must be None for {format.kind}: {format.kind} codes are not rounded")
    grouped = x.astype(jnp.float32).reshape(grouped_shape(x.shape, format))
    axes, zero = AXES[format.granularity], None
    if format.bits <= 2:
        codes, scale = (binary if format.bits == 1 else ternary)(grouped, axes)
        scale = jnp.squeeze(scale, axes)
    else:
        scale, zero = group_scale(x, format)
        zeros = None if zero is None else jnp.expand_dims(zero, axes)
        codes = encode(grouped, jnp.expand_dims(scale, axes), zeros, format, key=key)
    return Quantized(codes.reshape(x.shape), scale, zero, format)


def group_scale(
    x: Float[Array, "*shape"], format: Format, half: Any = None
) -> tuple[Array, Array | None]:
    """Return the scale of each group, and for asymmetric formats the value that code 0 represents; for 3 bits or
    more.

    Args:
        x: Values to quantize.
        format: The format to quantize to.
        half: $2^{b-1}$, if it differs from that of the format's bits; a float, which may be traced.
    """
    grouped = x.astype(jnp.float32).reshape(grouped_shape(x.shape, format))
    axes = AXES[format.granularity]
    half = 2 ** (format.bits - 1) if half is None else half
    if format.symmetric:
        steps = {"paper": half, "narrow": half - 1, "centered": half - 0.5}[format.spread]
        if format.floating:
            steps = float(jnp.finfo(FLOAT8).max)
        return _safe(_divided(jnp.max(jnp.abs(grouped), axes), steps, format)), None
    low, high = jnp.min(grouped, axes), jnp.max(grouped, axes)
    scale = _safe((high - low) / (2 * half - int(format.spread != "paper")))
    # Codes are signed, so code 0 is in the middle of the range.
    zero = (jnp.round(low / scale) if format.integer_zero else low / scale) + half
    # Equal values have no range: code 0 represents them.
    return scale, jnp.where(high == low, low, zero * scale)


def encode(
    x: Float[Array, "*shape"],
    scale: Float[Array, "*groups"],
    zero: Float[Array, "*groups"] | None,
    format: Format,
    *,
    key: PRNGKeyArray | None = None,
) -> Shaped[Array, "*shape"]:
    """Return the codes of values for given scales and zero points, which broadcast against them; for 3 bits or more."""
    x = _divided(x if zero is None else x - zero, scale, format)
    if format.floating:
        return x.astype(FLOAT8)
    x = jnp.round(x) if key is None else jnp.floor(x + jax.random.uniform(key, x.shape))
    return jnp.clip(x, *code_range(format)).astype(jnp.int8)


@typing.no_type_check
def fake_quantize(
    x: Float[Array, "*shape"], format: Format, *, key: PRNGKeyArray | None = None
) -> Float[Array, "*shape"]:
    """Quantize and dequantize, in the dtype of ``x``, with the gradient passed straight through.

    This is the straight-through estimator: in the backward pass, the map from ``x`` to the result is the identity,
    even where codes were clipped. It makes quantized weights trainable: the latent weights keep their precision and
    get the gradient.

    Args:
        x: As for ``quantize``.
        format: As for ``quantize``.
        key: As for ``quantize``.

    Example:
        >>> binary = Format(bits=1, granularity="tensor")
        >>> x = jnp.array([[0.5, -1.5]])
        >>> fake_quantize(x, binary).tolist()
        [[1.0, -1.0]]
        >>> jax.grad(lambda x: (fake_quantize(x, binary) ** 2).sum())(x).tolist()
        [[2.0, -2.0]]
    """

    @jax.custom_jvp
    def straight_through(x: Array) -> Array:
        return quantize(x, format, key=key).values().astype(x.dtype)

    straight_through.defjvp(lambda primals, tangents: (straight_through(*primals), *tangents))
    return straight_through(x)


def binary(x: Float[Array, "*grouped"], axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Return codes 1 and -1, and the mean magnitude of each group. A zero becomes 1: one bit has no third value."""
    return jnp.where(x < 0, -1, 1).astype(jnp.int8), jnp.mean(jnp.abs(x), axes, keepdims=True)


def ternary(x: Float[Array, "*grouped"], axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Return codes 1, 0 and -1, which are zero below 0.7 of the mean magnitude, and the mean magnitude of the nonzero ones in each group."""
    size = jnp.abs(x)
    mean = jnp.mean(size, axes, keepdims=True)
    large = size > 0.7 * mean
    count = jnp.sum(large, axes, keepdims=True, dtype=jnp.float32)
    scale = jnp.sum(jnp.where(large, size, 0.0), axes, keepdims=True) / jnp.maximum(count, 1.0)
    # A group of zeros has no large value, and neither has a group with an infinity or a NaN, which must stay visible.
    scale = jnp.where(jnp.isfinite(mean), scale, jnp.nan)
    return jnp.where(large, jnp.sign(x), 0.0).astype(jnp.int8), scale


def code_range(format: Format, half: Any = None) -> tuple[Any, Any]:
    """Return the smallest and the largest integer code, with ``half`` as for ``group_scale``.

    Example:
        >>> code_range(Format(bits=4)), code_range(Format(bits=4, spread="paper"))
        ((-7, 7), (-8, 7))
    """
    half = 2 ** (format.bits - 1) if half is None else half
    narrow = format.symmetric and format.spread == "narrow"
    return (1 - half if narrow else -half), half - 1


def scale_shape(shape: tuple[int, ...], format: Format) -> tuple[int, ...]:
    """Return the shape of the scales of an array of this shape.

    Raises:
        ValueError: The format does not match the shape.

    Example:
        >>> scale_shape((12, 64, 16), Format(bits=4, granularity="group", group_size=32))
        (12, 2, 16)
    """
    grouped = grouped_shape(shape, format)
    along = {len(grouped) + axis for axis in AXES[format.granularity]}
    return tuple(size for i, size in enumerate(grouped) if i not in along)


AXES = {"tensor": (-2, -1), "channel": (-2,), "group": (-2,), "block": (-3, -1), "token": (-1,)}
"""The axes of ``grouped_shape`` that a group spans."""


def grouped_shape(shape: tuple[int, ...], format: Format) -> tuple[int, ...]:
    """Return a shape in which ``AXES`` span exactly one group.

    Raises:
        ValueError: The format does not match the shape.
    """

    def check_shape(holds: bool, why: str) -> None:
        if not holds:
            raise ValueError(
                f"an array of shape {shape} cannot be quantized to {format.describe()}: {why}"
            )

    if format.granularity == "token":
        check_shape(len(shape) >= 1, "it needs at least one dimension")
        return shape
    check_shape(len(shape) >= 2, "it needs at least two dimensions")
    *stack, d_in, d_out = shape
    if format.granularity == "group":
        size = typing.cast("int", format.group_size)
        check_shape(d_in % size == 0, f"{size} does not divide {d_in} inputs")
        return (*stack, d_in // size, size, d_out)
    if format.granularity == "block":
        blocks = typing.cast("int", format.num_blocks)
        check_shape(d_out % blocks == 0, f"{blocks} does not divide {d_out} outputs")
        return (*stack, d_in, blocks, d_out // blocks)
    return shape


def _divided(x: Array, by: Any, format: Format) -> Array:
    """Divide values or their range by numbers that several of them share.

    XLA multiplies by the reciprocal, which rounds differently. In the symmetric spread ``centered`` the largest value of
    a group is half-way between two codes, and gets the other code than in compressed-tensors unless both quotients
    are exact.
    """
    exact = format.symmetric and format.spread == "centered"
    return x / (by + 0.0 * x) if exact else x / by


def _safe(scale: Array) -> Array:
    """Replace scales of zero, including those that underflowed, with one; NaN is kept."""
    return jnp.where(scale == 0, 1.0, scale)
