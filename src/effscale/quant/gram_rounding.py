r"""GPTQ: round a matrix row by row, and compensate each error in the rows still to come.

For a kernel W with inputs X, the relevant error is that of the product, $\lVert X W - X \hat W \rVert^2$, which
follows from the Gram matrix $H = X^T X$. With U the upper Cholesky factor of $H^{-1}$, for each input i in turn:

$$e = (W_i - \mathrm{quant}(W_i)) / U_{ii}, \qquad W_{j} \leftarrow W_{j} - U_{ij} \, e \quad \text{for } j > i$$

References:
    Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022),
        algorithm 1. https://arxiv.org/abs/2210.17323
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
    """Quantize a kernel so that its product with given inputs changes as little as possible.

    The cost is about ``d_in`` products of the kernel with one row, plus one Cholesky factorization of ``gram``.

    Args:
        kernel: ``(in, out)``.
        gram: ``x.T @ x`` for inputs x of shape ``(rows, in)``, summed over all rows; see ``input_grams``.
        format: Integers of 3, 4 or 8 bits, per channel, per tensor or in groups of inputs. The scale of a group is
            computed from its weights when the group is reached.
        damping: Fraction of the mean of the diagonal that is added to the diagonal, so that inputs that were never
            active do no harm.

    Returns:
        Codes and scales, as from ``quantize``. The scales are NaN if ``gram`` is not finite, or is singular despite
        the damping.

    Raises:
        ValueError: The format is not one of these, or does not match the shape.

    Example:
        >>> from effscale.quant import quantize
        >>> x = jax.random.normal(jax.random.key(0), (256, 16)) @ jax.random.normal(jax.random.key(1), (16, 16))
        >>> kernel, format = jax.random.normal(jax.random.key(2), (16, 8)), Format(bits=4)
        >>> error = lambda found: float(jnp.linalg.norm(x @ found.values() - x @ kernel))
        >>> error(gptq(kernel, x.T @ x, format)) < 0.8 * error(quantize(kernel, format))
        True

    References:
        Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022).
            https://arxiv.org/abs/2210.17323
    """
    if not can_gptq(format):
        raise ValueError(
            f"format must be integers of 3, 4 or 8 bits per channel, per tensor or in groups for GPTQ, got {format.describe()}"
        )
    if not damping > 0:
        raise ValueError(f"damping must be positive, got {damping}. 0.01 is a common value")
    if kernel.ndim != 2 or gram.shape != (kernel.shape[0],) * 2:
        raise ValueError(
            f"kernel and gram must have shapes (in, out) and (in, in), got {kernel.shape} and {gram.shape}"
        )
    d_in, d_out = kernel.shape
    grouped_shape(kernel.shape, format)  # raises for a format that does not match the shape
    factor = _factor(gram.astype(jnp.float32), damping)
    if format.granularity == "group":
        width = format.group_size or d_in
    else:
        width = d_in
        scale, zero = group_scale(kernel.astype(jnp.float32), format)
    whole = jnp.arange(d_in)

    def group(weights: Array, start: Array) -> tuple[Array, tuple[Array, Array, Array | None]]:
        """Round the rows of one group, and compensate in all later rows."""
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
    # If the factorization fails, the codes must not look valid.
    s = jnp.where(jnp.isfinite(factor).all(), s, jnp.nan)
    if format.granularity == "group":
        return Quantized(codes, s, z, format)
    return Quantized(codes, s[0], None if z is None else z[0], format)


def can_gptq(format: Format) -> bool:
    """Return whether ``gptq`` supports a format."""
    by_group = format.granularity in ("tensor", "channel", "group")
    return format.bits > 2 and not format.floating and by_group


def _factor(gram: Array, damping: float) -> Array:
    """Return the upper Cholesky factor of the inverse of the damped Gram matrix."""
    diagonal = jnp.diagonal(gram)
    # An input that is always zero would make the matrix singular; the values of its weights do not matter.
    gram = gram + jnp.diag(jnp.where(diagonal == 0, 1.0, 0.0) + damping * jnp.mean(diagonal))
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)
    inverse = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(gram), True), identity)
    return jnp.linalg.cholesky(inverse).T
