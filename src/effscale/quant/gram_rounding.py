r"""GPTQ: rounding a matrix row by row, each error made up for by the rows that are still to come.

Of a kernel W with inputs x the error that matters is that of the product, $\lVert X W - X \hat W \rVert^2$, which the Gram matrix
$H = X^T X$ knows. With U the upper Cholesky factor of $H^{-1}$, for each input i in turn:

$$e = (W_i - \mathrm{quant}(W_i)) / U_{ii}, \qquad W_{j} \leftarrow W_{j} - U_{ij} \, e \quad \text{for } j > i$$

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022, algorithm 1.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effscale.quant.formats import Format
from effscale.quant.quantizers import Quantized, encode, group_scale, grouped_shape


def gptq(
    kernel: Float[Array, "d_in d_out"],
    gram: Float[Array, "d_in d_in"],
    format: Format,
    *,
    damping: float = 0.01,
) -> Quantized:
    """Quantizes a kernel so that its product with given inputs changes least.

    It costs about as much as ``d_in`` products of the kernel with one row, and one Cholesky factor of ``gram``.

    Args:
        kernel: ``(in, out)``.
        gram: ``x.T @ x`` of inputs x of shape ``(rows, in)``, summed over as many rows as there are; see `input_grams`.
        format: Integers of 3, 4 or 8 bits, per channel, per tensor or in groups of inputs. A group's scale is that of its
            weights when its turn comes.
        damping: Part of the mean of the diagonal that is added to it, so that inputs that were never seen do no harm.

    Returns:
        Codes and scales, as from `quantize`. The scales are NaN where ``gram`` is not finite, or singular in spite of the damping.

    Raises:
        ValueError: The format is none of these, or does not fit.

    Example:
        >>> from effscale.quant import quantize
        >>> x = jax.random.normal(jax.random.key(0), (256, 16)) @ jax.random.normal(jax.random.key(1), (16, 16))
        >>> kernel, format = jax.random.normal(jax.random.key(2), (16, 8)), Format(bits=4)
        >>> error = lambda found: float(jnp.linalg.norm(x @ found.values() - x @ kernel))
        >>> error(gptq(kernel, x.T @ x, format)) < 0.8 * error(quantize(kernel, format))
        True

    References:
        Frantar et al., `GPTQ <https://arxiv.org/abs/2210.17323>`_, 2022
    """
    if not can_gptq(format):
        raise ValueError(
            f"format: {format.describe()}: GPTQ takes integers of 3, 4 or 8 bits per channel, per tensor or in groups"
        )
    if not damping > 0:
        raise ValueError(f"damping={damping} must be positive; 0.01 is usual")
    if kernel.ndim != 2 or gram.shape != (kernel.shape[0],) * 2:
        raise ValueError(
            f"a kernel of shape {kernel.shape} and a Gram matrix of shape {gram.shape}: they must be (in, out) and (in, in)"
        )
    d_in, d_out = kernel.shape
    grouped_shape(kernel.shape, format)  # what does not fit is refused here
    factor = _factor(gram.astype(jnp.float32), damping)
    if format.granularity == "group":
        width = format.group_size or d_in
    else:
        width = d_in
        scale, zero = group_scale(kernel.astype(jnp.float32), format)
    whole = jnp.arange(d_in)

    def group(weights: Array, start: Array) -> tuple[Array, tuple[Array, Array, Array | None]]:
        """Rounds the rows of one group; all later rows make up for it."""
        if format.granularity == "group":
            own = jax.lax.dynamic_slice(weights, (start, 0), (width, d_out))
            one = Format(
                bits=format.bits,
                symmetric=format.symmetric,
                spread=format.spread,
                integer_zero=format.integer_zero,
            )
            s, z = group_scale(own, one)
        else:
            s, z = scale, zero

        def row(weights: Array, i: Array) -> tuple[Array, Array]:
            w = jax.lax.dynamic_index_in_dim(weights, i, 0, keepdims=False)
            codes = encode(w, s, z, format)
            rounded = codes.astype(jnp.float32) * s + (0.0 if z is None else z)
            of_row = jax.lax.dynamic_index_in_dim(factor, i, 0, keepdims=False)
            error = (w - rounded) / of_row[i]
            later = jnp.where(whole > i, of_row, 0.0)
            return weights - later[:, None] * error[None], codes

        weights, codes = jax.lax.scan(row, weights, start + jnp.arange(width))
        return weights, (codes, s, z)

    starts = jnp.arange(0, d_in, width)
    _, (codes, s, z) = jax.lax.scan(group, kernel.astype(jnp.float32), starts)
    codes = codes.reshape(d_in, d_out)
    # A factor that does not exist must not end as codes that look sound.
    s = jnp.where(jnp.isfinite(factor).all(), s, jnp.nan)
    if format.granularity == "group":
        return Quantized(codes, s, z, format)
    return Quantized(codes, s[0], None if z is None else z[0], format)


def can_gptq(format: Format) -> bool:
    """Whether a format is of those that `gptq` takes."""
    by_group = format.granularity in ("tensor", "channel", "group")
    return format.bits > 2 and not format.floating and by_group


def _factor(gram: Array, damping: float) -> Array:
    """The upper Cholesky factor of the inverse of the damped Gram matrix."""
    diagonal = jnp.diagonal(gram)
    # An input that is always zero would make the matrix singular; what its weights become does not matter.
    gram = gram + jnp.diag(jnp.where(diagonal == 0, 1.0, 0.0) + damping * jnp.mean(diagonal))
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)
    inverse = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(gram), True), identity)
    return jnp.linalg.cholesky(inverse).T
