"""The bodies of the TPU kernels; ``tpu`` documents what they compute and how they are called.

Arrays with one number per token are columns [tokens, 1]; those with one number per word are rows [1,
vocab]. A tile that extends past its array reads undefined values there: rows of ``weight`` and ``hidden``
are zeroed before they enter a sum, and the bias row is padded with ``LOWEST``, which contributes nothing to
a softmax.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)


def _dot(left: Array, right: Array, contract: tuple[int, int]) -> Array:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _indices(start: Any, shape: tuple[int, ...], axis: int) -> Array:
    return start + jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _keep_rows(values: Array, start: Any, size: int) -> Array:
    """Set the rows beyond ``size`` to zero; only a tile that extends past the array has such rows."""
    if size % values.shape[0] == 0:
        return values
    return jnp.where(_indices(start, values.shape, 0) < size, values, jnp.zeros_like(values))


def forward_kernel(
    hidden, weight, bias, labels, normalizer, at_label, *more, vocab: int, with_gradient: bool
) -> None:
    """Compute the online softmax and the mean of the other words; grid (token tiles, vocabulary tiles).

    ``more`` is the result of that mean (only with the gradient), three columns of scratch memory, and the
    mean's scratch memory (only with the gradient).
    """
    *mean_result, peak, total, picked = more[:4] if with_gradient else more
    mean = more[4:]
    tile = pl.program_id(1)

    @pl.when(tile == 0)
    def _():
        peak[...] = jnp.full_like(peak, LOWEST)
        total[...] = jnp.zeros_like(total)
        picked[...] = jnp.zeros_like(picked)
        for ref in mean:
            ref[...] = jnp.zeros_like(ref)

    rows, words = hidden.shape[0], weight.shape[0]
    embeddings = _keep_rows(weight[...], tile * words, vocab)
    logits = _dot(hidden[...], embeddings, (1, 1)) + jnp.broadcast_to(bias[...], (rows, words))
    is_label = _indices(tile * words, logits.shape, 1) == labels[...]
    highest = jnp.maximum(peak[...], jnp.max(logits, axis=1, keepdims=True))
    rescale = jnp.exp(peak[...] - highest)
    unnormalized = jnp.exp(logits - highest)
    peak[...] = highest
    total[...] = total[...] * rescale + jnp.sum(unnormalized, axis=1, keepdims=True)
    picked[...] += jnp.sum(jnp.where(is_label, logits, 0.0), axis=1, keepdims=True)
    for ref in mean:
        others = jnp.where(is_label, 0.0, unnormalized).astype(embeddings.dtype)
        ref[...] = ref[...] * rescale + _dot(others, embeddings, (1, 0))

    @pl.when(tile == pl.num_programs(1) - 1)
    def _():
        normalizer[...] = peak[...] + jnp.log(total[...])
        at_label[...] = picked[...]
        for result, ref in zip(mean_result, mean, strict=True):
            result[...] = ref[...] / total[...]


def weight_kernel(
    hidden,
    weight,
    bias,
    labels,
    normalizer,
    smooth_factor,
    label_factor,
    gradient,
    bias_gradient,
    total,
    *,
    tokens: int,
) -> None:
    """Sum the logits' gradient, multiplied by ``hidden`` and by itself; grid (vocabulary tiles, token tiles)."""
    tile = pl.program_id(1)

    @pl.when(tile == 0)
    def _():
        total[...] = jnp.zeros_like(total)
        bias_gradient[...] = jnp.zeros_like(bias_gradient)

    rows, words = hidden.shape[0], weight.shape[0]
    states = _keep_rows(hidden[...], tile * rows, tokens)
    logits = _dot(states, weight[...], (1, 1)) + jnp.broadcast_to(bias[...], (rows, words))
    smooth = jnp.exp(logits - normalizer[...]) * smooth_factor[...]
    is_label = _indices(pl.program_id(0) * words, logits.shape, 1) == labels[...]
    by_logit = _keep_rows(
        jnp.where(is_label, smooth - label_factor[...], smooth), tile * rows, tokens
    )
    total[...] += _dot(by_logit.astype(states.dtype), states, (0, 0))
    bias_gradient[...] += jnp.sum(by_logit, axis=0, keepdims=True)

    @pl.when(tile == pl.num_programs(1) - 1)
    def _():
        gradient[...] = total[...].astype(gradient.dtype)
