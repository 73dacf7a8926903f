"""Pallas TPU kernels: no logit ever leaves VMEM.

Two kernels iterate over the same tiles of [tokens, vocab] logits.

- The forward kernel holds a tile of tokens while the vocabulary streams by. It keeps a running
  maximum and sum (the online softmax), the label's logit, and, for the gradient of ``hidden``, the
  running mean of the other words' embeddings, as attention does with its values:

      dloss/dh = w (c sum_{v != y} p[v] W[v]  +  (c p[y] - 1) W[y]),   c = 1 + 2 z lse

    The label's own row is left out of the sum and added outside the kernel. If the sum included it, a
    token predicted with confidence would get its small gradient as the difference of two large
    rounded vectors.
  - The weight kernel holds a tile of the vocabulary while the tokens stream by, and recomputes the
    logits for its gradient.

  This takes four matrix products where ``chunked`` takes three, but its memory does not depend on the
  vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas import dispatch
from kernels_pallas.cross_entropy.chunked import Gradients
from kernels_pallas.cross_entropy.tpu_kernels import LOWEST, forward_kernel, weight_kernel
from kernels_pallas.manual_axes import result_type, varying_axes

# v5e and later generations have at least 64 MiB of VMEM; the compiler gets what the budget leaves of
# the limit.
_VMEM_LIMIT = 56 * 2**20
_VMEM_BUDGET = 40 * 2**20
_LANES = 128


def why_not(hidden: Any, vocab_weight: Any) -> str | None:
    """Return why the kernels do not support these operands, or None."""
    if reason := dispatch.small_vmem():
        return reason
    if tiles(_padded(hidden.shape[1]), hidden.dtype.itemsize) is None:
        return f"d={hidden.shape[1]} in {hidden.dtype} leaves no room for a 128 x 128 tile in VMEM"
    return None


def tiles(width: int, itemsize: int) -> tuple[int, int] | None:
    """Return the largest numbers of resident and of streamed rows that fit in VMEM together.

    The reuse of the streamed operand, and so the arithmetic intensity, grows with the number of resident rows.
    """
    for stays in (1024, 512, 256, 128):
        for streams in (512, 256, 128):
            operands = 2 * itemsize * width * (stays + streams)  # double buffered
            sums = 3 * 4 * width * stays  # accumulator and double-buffered result, float32
            logits = 4 * 4 * stays * streams  # about four float32 values per logit at a time
            if operands + sums + logits <= _VMEM_BUDGET:
                return stays, streams
    return None


def _padded(size: int, multiple: int = _LANES) -> int:
    return pl.cdiv(size, multiple) * multiple


class _Operands(NamedTuple):
    """The operands in the form that the kernels need, and the numbers of resident and streamed rows of a tile."""

    hidden: Array  # [tokens, wide], with `wide` the width as whole lanes
    weight: Array  # [vocab, wide]
    bias: Array  # [1, whole tiles of words], LOWEST beyond the vocabulary
    labels: Array  # [tokens, 1]
    stays: int
    streams: int


def _prepare(hidden, vocab_weight, bias, labels) -> _Operands:
    width, vocab = hidden.shape[1], vocab_weight.shape[0]
    wide = _padded(width)
    fitting = tiles(wide, hidden.dtype.itemsize)
    assert fitting is not None, "why_not rejects such widths"
    stays, streams = fitting
    weight = vocab_weight.astype(hidden.dtype)
    if wide != width:
        hidden, weight = (jnp.pad(x, ((0, 0), (0, wide - width))) for x in (hidden, weight))
    row = jnp.zeros((vocab,), jnp.float32) if bias is None else bias.astype(jnp.float32)
    row = jnp.pad(row, (0, -vocab % max(stays, streams)), constant_values=LOWEST)
    return _Operands(hidden, weight, row[None, :], labels[:, None], stays, streams)


def _call(
    kernel, blocks, swap, operands, columns, results, scratch, products, interpret
) -> list[Array]:
    """Run a kernel over all tiles of [tokens, vocab]; ``swap`` makes words the outer loop.

    ``columns`` are additional operands with one number per token. ``results`` are triples (shape, dtype,
    "token" | "word" | "row"); the last names what the leading dimension runs over, or a row with one
    number per word.
    """
    block_tokens, block_words = blocks
    (tokens, wide), vocab = operands.hidden.shape, operands.weight.shape[0]
    grid = pl.cdiv(tokens, block_tokens), pl.cdiv(vocab, block_words)
    token = (lambda i, j: (j, 0)) if swap else (lambda i, j: (i, 0))
    word = (lambda i, j: (i, 0)) if swap else (lambda i, j: (j, 0))
    row = (lambda i, j: (0, i)) if swap else (lambda i, j: (0, j))
    column_spec = pl.BlockSpec((block_tokens, 1), token)

    def spec(shape, over):
        return {
            "token": pl.BlockSpec((block_tokens, shape[1]), token),
            "word": pl.BlockSpec((block_words, shape[1]), word),
            "row": pl.BlockSpec((1, block_words), row),
        }[over]

    arrays = (operands.hidden, operands.weight, operands.bias, operands.labels, *columns)
    axes = varying_axes(arrays)
    streamed = grid[1] * tokens if swap else grid[0] * vocab
    call = pl.pallas_call(
        kernel,
        grid=grid[::-1] if swap else grid,
        in_specs=[
            pl.BlockSpec((block_tokens, wide), token),
            pl.BlockSpec((block_words, wide), word),
            pl.BlockSpec((1, block_words), row),
            column_spec,
            *(column_spec for _ in columns),
        ],
        out_specs=[spec(shape, over) for shape, _, over in results],
        out_shape=[result_type(shape, dtype, axes) for shape, dtype, _ in results],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * tokens * vocab * wide,
            transcendentals=tokens * vocab,
            bytes_accessed=streamed * wide * operands.hidden.dtype.itemsize,
        ),
        interpret=interpret,
    )
    return list(call(*arrays))


def _forward(operands: _Operands, *, with_gradient: bool, interpret: Any) -> list[Array]:
    """Return log normalizer and label's logit, [tokens, 1], and the mean of the other words, [tokens, wide]."""
    (tokens, wide), vocab = operands.hidden.shape, operands.weight.shape[0]
    blocks = min(operands.stays, _padded(tokens)), operands.streams
    column = ((tokens, 1), jnp.float32, "token")
    results, scratch = [column, column], [(blocks[0], 1)] * 3
    if with_gradient:
        results.append(((tokens, wide), jnp.float32, "token"))
        scratch.append((blocks[0], wide))
    kernel = functools.partial(forward_kernel, vocab=vocab, with_gradient=with_gradient)
    return _call(
        kernel, blocks, False, operands, (), results, scratch, 1 + with_gradient, interpret
    )


def _weight_gradient(operands: _Operands, columns, dtype, interpret) -> tuple[Array, Array]:
    """Return the gradient [vocab, wide] in ``dtype``, and the float32 [vocab] gradient of the bias."""
    (tokens, wide), vocab = operands.hidden.shape, operands.weight.shape[0]
    blocks = min(operands.streams, _padded(tokens)), operands.stays
    results = [
        ((vocab, wide), dtype, "word"),
        (operands.bias.shape, jnp.float32, "row"),
    ]
    kernel = functools.partial(weight_kernel, tokens=tokens)
    scratch = [(blocks[1], wide)]
    gradient, row = _call(kernel, blocks, True, operands, columns, results, scratch, 2, interpret)
    return gradient, row[0, :vocab]


def _losses(labels: Array, normalizer: Array, at_label: Array, z_loss: float) -> Array:
    return jnp.where(labels >= 0, (normalizer - at_label + z_loss * normalizer**2)[:, 0], 0.0)


def tpu_loss(
    hidden: Float[Array, "tokens d"],
    vocab_weight: Float[Array, "vocab d"],
    bias: Float[Array, " vocab"] | None,
    labels: Int[Array, " tokens"],
    weights: Float[Array, " tokens"],
    *,
    z_loss: float = 0.0,
    interpret: Any = False,
) -> Float[Array, ""]:
    """Compute only the loss. Labels are in [0, vocab), or negative if the weight is 0."""
    operands = _prepare(hidden, vocab_weight, bias, labels)
    normalizer, at_label = _forward(operands, with_gradient=False, interpret=interpret)
    return jnp.sum(weights * _losses(labels, normalizer, at_label, z_loss))


def tpu_loss_and_gradients(
    hidden: Float[Array, "tokens d"],
    vocab_weight: Float[Array, "vocab d"],
    bias: Float[Array, " vocab"] | None,
    labels: Int[Array, " tokens"],
    weights: Float[Array, " tokens"],
    *,
    z_loss: float = 0.0,
    interpret: Any = False,
) -> tuple[Float[Array, ""], Gradients]:
    """Compute the loss and gradients in the dtypes of their operands; ``interpret`` as in ``pl.pallas_call``."""
    width = hidden.shape[1]
    operands = _prepare(hidden, vocab_weight, bias, labels)
    normalizer, at_label, others = _forward(operands, with_gradient=True, interpret=interpret)
    losses = _losses(labels, normalizer, at_label, z_loss)
    weight, smooth = weights[:, None], 1.0 + 2.0 * z_loss * normalizer
    # c p[y] - 1, in a form without cancellation if p[y] is near 1.
    log_probability = at_label - normalizer
    share = jnp.expm1(log_probability) + (smooth - 1.0) * jnp.exp(log_probability)
    own = vocab_weight[jnp.maximum(labels, 0)].astype(hidden.dtype).astype(jnp.float32)
    d_hidden = weight * (smooth * others[:, :width] + share * own)
    columns = normalizer, weight * smooth, weight
    d_weight, d_bias = _weight_gradient(operands, columns, vocab_weight.dtype, interpret)
    gradients = Gradients(
        hidden=d_hidden.astype(hidden.dtype),
        vocab_weight=d_weight[:, :width],
        bias=None if bias is None else d_bias.astype(bias.dtype),
        weights=losses,
    )
    return jnp.sum(weights * losses), gradients
