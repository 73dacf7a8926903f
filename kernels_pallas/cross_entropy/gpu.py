"""Hopper GPUs: matrix products by cuBLAS one chunk at a time, with one Mosaic GPU kernel between them.

The kernel takes the float32 logits of a chunk and returns the log normalizer of each row and, in the
dtype of the matrix products, the gradient of its logits: a warpgroup reads its row twice and writes it
once. Everything around it is ``chunked``.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels_pallas.cross_entropy import chunked
from kernels_pallas.manual_axes import result_type, varying_axes

# The part of a row that the 128 threads of a warpgroup hold at a time: two loads of 16 bytes each.
_TILE = 1024
_LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)
# 128 MiB of float32 logits: enough rows to fill 132 multiprocessors, and small compared with 80 GB.
_CHUNK_LOGITS = 2**25
_MIN_CHUNK, _MAX_CHUNK = 256, 8192


def _kernel(logits_ref, labels_ref, normalizer_ref, gradient_ref, *, vocab, z_loss):
    row = jax.lax.axis_index("row")
    layout = plgpu.Layout.WG_STRIDED((_TILE,), vec_size=4)
    tiles = logits_ref.shape[1] // _TILE

    def tile(index):
        start = index * _TILE
        columns = plgpu.broadcasted_iota(jnp.int32, (_TILE,), 0, layout=layout) + start
        logits = plgpu.layout_cast(logits_ref[row, pl.ds(start, _TILE)], layout)
        return jnp.where(columns < vocab, logits, _LOWEST), columns

    def online(index, carry):
        peaks, sums = carry
        logits, _ = tile(index)
        higher = jnp.maximum(peaks, logits)
        return higher, sums * jnp.exp(peaks - higher) + jnp.exp(logits - higher)

    # Each of the 1024 positions keeps its own maximum and sum, so the threads synchronize once per row
    # instead of once per tile. A position that saw only padding holds _LOWEST, and the last factor sets
    # its sum to 0.
    start = tuple(
        plgpu.layout_cast(jnp.full((_TILE,), fill, jnp.float32), layout) for fill in (_LOWEST, 0.0)
    )
    peaks, sums = jax.lax.fori_loop(0, tiles, online, start)
    peak = jnp.max(peaks)
    total = jnp.sum(sums * jnp.exp(peaks - peak))
    normalizer = peak + jnp.log(total)
    normalizer_ref[row] = normalizer
    factor = (1.0 + 2.0 * z_loss * normalizer) / total
    label = labels_ref[row]

    def write(index, _):
        logits, columns = tile(index)
        smooth = jnp.exp(logits - peak) * factor
        gradient = jnp.where(columns == label, smooth - 1.0, smooth)
        gradient_ref[row, pl.ds(index * _TILE, _TILE)] = gradient.astype(gradient_ref.dtype)

    jax.lax.fori_loop(0, tiles, write, None)


def softmax_rows(
    logits: Float[Array, "rows padded"],
    labels: Int[Array, " rows"],
    *,
    vocab: int,
    z_loss: float,
    dtype: Any,
    interpret: Any = None,
) -> tuple[Float[Array, " rows"], Float[Array, "rows padded"]]:
    """Return the log normalizer of each row over ``vocab`` logits, and the gradient of its loss by them in ``dtype``.

    ``padded`` is a multiple of 1024. The gradient beyond ``vocab`` is 0; if the label is negative, no
    label is subtracted.
    """
    axes = varying_axes(logits, labels)
    rows, padded = logits.shape
    call = plgpu.kernel(
        functools.partial(_kernel, vocab=vocab, z_loss=z_loss),
        out_type=[
            result_type((rows,), jnp.float32, axes),
            result_type((rows, padded), dtype, axes),
        ],
        grid=(rows,),
        grid_names=("row",),
        interpret=interpret,
    )
    normalizer, gradient = call(logits, labels)
    return normalizer, gradient


def _chunk_size(tokens: int, vocab: int) -> int:
    return chunked.chunk_size(tokens, min(max(_CHUNK_LOGITS // vocab, _MIN_CHUNK), _MAX_CHUNK))


def gpu_loss(
    hidden: Float[Array, "tokens d"],
    vocab_weight: Float[Array, "vocab d"],
    bias: Float[Array, " vocab"] | None,
    labels: Int[Array, " tokens"],
    weights: Float[Array, " tokens"],
    *,
    z_loss: float = 0.0,
) -> Float[Array, ""]:
    """Compute only the loss: without a gradient to write, XLA's own reductions suffice."""
    chunk = _chunk_size(hidden.shape[0], vocab_weight.shape[0])
    return chunked.chunked_loss(
        hidden, vocab_weight, bias, labels, weights, z_loss=z_loss, chunk_tokens=chunk
    )


def gpu_loss_and_gradients(
    hidden: Float[Array, "tokens d"],
    vocab_weight: Float[Array, "vocab d"],
    bias: Float[Array, " vocab"] | None,
    labels: Int[Array, " tokens"],
    weights: Float[Array, " tokens"],
    *,
    z_loss: float = 0.0,
    interpret: Any = None,
) -> tuple[Float[Array, ""], chunked.Gradients]:
    """Compute the loss and gradients in the dtypes of their operands; ``interpret`` as in ``plgpu.kernel``."""
    tokens, vocab = hidden.shape[0], vocab_weight.shape[0]

    def tile(logits, labels, weights):
        normalizer, gradient = softmax_rows(
            logits, labels, vocab=vocab, z_loss=z_loss, dtype=hidden.dtype, interpret=interpret
        )
        return chunked.Tile(
            chunked.token_losses(logits, labels, normalizer, z_loss), gradient, weights
        )

    # Whole tiles for the kernel, and aligned rows for cuBLAS: with 50257 it would fall back to
    # slow kernels.
    padding = -vocab % _TILE
    total, gradients = chunked.chunked_loss_and_gradients(
        hidden,
        jnp.pad(vocab_weight, ((0, padding), (0, 0))),
        None if bias is None else jnp.pad(bias, (0, padding)),
        labels,
        weights,
        z_loss=z_loss,
        chunk_tokens=_chunk_size(tokens, vocab),
        tile=tile,
    )
    d_weight, d_bias = gradients.vocab_weight[:vocab], gradients.bias
    return total, gradients._replace(
        vocab_weight=d_weight, bias=None if d_bias is None else d_bias[:vocab]
    )
