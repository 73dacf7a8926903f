"""Pallas TPU kernels: no logit ever leaves VMEM.

Two kernels walk the same tiles of [tokens, vocab] logits.

- `_forward_kernel` holds a tile of tokens while the vocabulary streams by, and keeps a running maximum and sum (the online
  softmax), the label's logit, and, for the gradient of `hidden`, the running mean of the other words' embeddings
  as attention does with its values:

      dloss/dh = w (c sum_{v != y} p[v] W[v]  +  (c p[y] - 1) W[y]),   c = 1 + 2 z lse

  The label's own row is left out of the sum and added outside the kernel. If the sum held it, a token
  predicted with confidence would get its small gradient as the difference of two large rounded vectors.
- `_weight_kernel` holds a tile of the vocabulary while the tokens stream by, and recomputes the logits for its gradient.

That is four matrix products where `chunked` has three, for memory that does not depend on the vocabulary.
A tile that overhangs the tokens or the vocabulary reads undefined values there; they are masked before they can meet a sum.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas.cross_entropy.chunked import Gradients
from kernels_pallas.manual_axes import result_type, varying_axes

# The generations from v5e on have at least 64 MiB of VMEM; the rest of the limit is the compiler's own scratch.
_VMEM_LIMIT = 56 * 2**20
_VMEM_BUDGET = 40 * 2**20
_TOO_OLD = ("TPU v2", "TPU v3", "TPU v4")
_LANES = 128
_LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)


def why_not(hidden: Any, vocab_weight: Any) -> str | None:
    """The reason why the kernels cannot serve these operands, or None."""
    if jax.default_backend() == "tpu" and (kind := jax.devices()[0].device_kind).startswith(
        _TOO_OLD
    ):
        return f"{kind} has too little VMEM"
    width = _padded(hidden.shape[1])
    if tiles(width, hidden.dtype.itemsize) is None:
        return f"d={width} in {hidden.dtype} leaves no room for a {_LANES} x {_LANES} tile in VMEM"
    return None


def tiles(width: int, itemsize: int) -> tuple[int, int] | None:
    """Rows of the operand that stays and of the one that streams by, the largest that fit in VMEM.

    The reuse of the streamed operand, and so the intensity, grows with the rows that stay.
    """
    for stays in (1024, 512, 256, 128):
        for streams in (512, 256, 128):
            operands = 2 * itemsize * width * (stays + streams)  # double buffered
            results = (
                width * stays * (4 + 2 * 4)
            )  # float32 accumulator and a double-buffered float32 result
            if operands + results + 4 * 4 * stays * streams <= _VMEM_BUDGET:
                return stays, streams
    return None


def _padded(width: int) -> int:
    return pl.cdiv(width, _LANES) * _LANES


def _fit(block: int, size: int) -> int:
    """A block no larger than the padded dimension needs."""
    return min(block, _padded(size))


def _dot(left: Array, right: Array, contract: tuple[int, int]) -> Array:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _indices(start: Any, shape: tuple[int, ...], axis: int) -> Array:
    return start + jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _keep_rows(values: Array, start: Any, size: int) -> Array:
    """Zeros in place of the rows beyond `size`, which only an overhanging tile has."""
    if size % values.shape[0] == 0:
        return values
    return jnp.where(_indices(start, values.shape, 0) < size, values, jnp.zeros_like(values))


def _logit_tile(hidden: Array, weight: Array, bias_ref: Any, columns: Array, vocab: int) -> Array:
    logits = _dot(hidden, weight, (1, 1))
    if bias_ref is not None:
        logits = logits + jnp.broadcast_to(bias_ref[...], logits.shape)
    return logits if vocab % logits.shape[1] == 0 else jnp.where(columns < vocab, logits, _LOWEST)


def _logit_gradient(logits, columns, labels_ref, normalizer_ref, factors_ref):
    """`factors[:, 0] * softmax - factors[:, 1] * onehot`, in float32."""
    probability = jnp.exp(logits - normalizer_ref[...])
    factors = factors_ref[...]
    smooth = probability * factors[:, 0:1]
    return jnp.where(columns == labels_ref[...], smooth - factors[:, 1:2], smooth)


def _forward_kernel(*refs, vocab, has_bias, with_gradient):
    hidden_ref, weight_ref, labels_ref = refs[:3]
    bias_ref = refs[3] if has_bias else None
    results = refs[3 + has_bias : 5 + has_bias + with_gradient]
    peak_ref, total_ref, picked_ref, *mean_ref = refs[5 + has_bias + with_gradient :]
    tile = pl.program_id(1)

    @pl.when(tile == 0)
    def _():
        peak_ref[...] = jnp.full_like(peak_ref, _LOWEST)
        for ref in (total_ref, picked_ref, *mean_ref):
            ref[...] = jnp.zeros_like(ref)

    shape = hidden_ref.shape[0], weight_ref.shape[0]
    start = tile * shape[1]
    columns = _indices(start, shape, 1)
    weight = _keep_rows(weight_ref[...], start, vocab)
    logits = _logit_tile(hidden_ref[...], weight, bias_ref, columns, vocab)
    is_label = columns == labels_ref[...]
    peak = jnp.maximum(peak_ref[...], jnp.max(logits, axis=1, keepdims=True))
    rescale = jnp.exp(peak_ref[...] - peak)
    unnormalized = jnp.exp(logits - peak)
    total_ref[...] = total_ref[...] * rescale + jnp.sum(unnormalized, axis=1, keepdims=True)
    picked_ref[...] += jnp.sum(jnp.where(is_label, logits, 0.0), axis=1, keepdims=True)
    peak_ref[...] = peak
    for ref in mean_ref:
        others = jnp.where(is_label, 0.0, unnormalized).astype(weight.dtype)
        ref[...] = ref[...] * rescale + _dot(others, weight, (1, 0))

    @pl.when(tile == pl.num_programs(1) - 1)
    def _():
        results[0][...] = peak_ref[...] + jnp.log(total_ref[...])
        results[1][...] = picked_ref[...]
        for ref, mean in zip(results[2:], mean_ref, strict=True):
            ref[...] = mean[...] / total_ref[...]


def _weight_kernel(*refs, tokens, vocab, has_bias):
    hidden_ref, weight_ref, labels_ref, normalizer_ref, factors_ref = refs[:5]
    bias_ref = refs[5] if has_bias else None
    gradient_ref, *bias_gradient_ref, sum_ref = refs[5 + has_bias :]
    tile = pl.program_id(1)

    @pl.when(tile == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        for ref in bias_gradient_ref:
            ref[...] = jnp.zeros_like(ref)

    shape = hidden_ref.shape[0], weight_ref.shape[0]
    start = tile * shape[0]
    columns = _indices(pl.program_id(0) * shape[1], shape, 1)
    hidden = _keep_rows(hidden_ref[...], start, tokens)
    logits = _logit_tile(hidden, weight_ref[...], bias_ref, columns, vocab)
    gradient = _logit_gradient(logits, columns, labels_ref, normalizer_ref, factors_ref)
    gradient = _keep_rows(gradient, start, tokens)
    sum_ref[...] += _dot(gradient.astype(hidden.dtype), hidden, (0, 0))
    for ref in bias_gradient_ref:
        ref[...] += jnp.sum(gradient, axis=0, keepdims=True)

    @pl.when(tile == pl.num_programs(1) - 1)
    def _():
        gradient_ref[...] = sum_ref[...].astype(gradient_ref.dtype)


class _Call:
    """The operands in the shapes that the kernels want, and the two kernels applied to them."""

    def __init__(self, hidden, vocab_weight, bias, labels, interpret):
        (self.tokens, self.width), self.vocab = hidden.shape, vocab_weight.shape[0]
        self.interpret = interpret
        padding = ((0, 0), (0, _padded(self.width) - self.width))
        pad = (lambda x: jnp.pad(x, padding)) if padding[1][1] else (lambda x: x)
        self.operands = [pad(hidden), pad(vocab_weight.astype(hidden.dtype)), labels[:, None]]
        self.bias = [] if bias is None else [bias.astype(jnp.float32)[None, :]]
        stays, streams = tiles(_padded(self.width), hidden.dtype.itemsize)
        self.by_token = _fit(stays, self.tokens), _fit(streams, self.vocab)
        self.by_vocab = _fit(streams, self.tokens), _fit(stays, self.vocab)

    def _run(
        self, kernel, columns, results, block_of_result, scratch, blocks, token_axis, **static
    ):
        """One kernel over all tiles; `columns` are further operands with a row for each token."""
        block_tokens, block_vocab = blocks
        wide = self.operands[0].shape[1]
        grid = [pl.cdiv(self.tokens, block_tokens), pl.cdiv(self.vocab, block_vocab)]
        if token_axis:
            grid.reverse()
        token = (lambda i, j: (j, 0)) if token_axis else (lambda i, j: (i, 0))
        word = (lambda i, j: (i, 0)) if token_axis else (lambda i, j: (j, 0))
        word_column = (lambda i, j: (0, i)) if token_axis else (lambda i, j: (0, j))
        specs = [pl.BlockSpec((block_tokens, wide), token), pl.BlockSpec((block_vocab, wide), word)]
        specs += [
            pl.BlockSpec((block_tokens, column.shape[1]), token)
            for column in (self.operands[2], *columns)
        ]
        specs += [pl.BlockSpec((1, block_vocab), word_column) for _ in self.bias]
        index = {"token": token, "word": word, "word_column": word_column}
        operands = (*self.operands, *columns, *self.bias)
        axes = varying_axes(operands)
        products = 1 + (kernel is _weight_kernel or static.get("with_gradient", False))
        return pl.pallas_call(
            functools.partial(kernel, vocab=self.vocab, has_bias=len(self.bias), **static),
            grid=tuple(grid),
            in_specs=specs,
            out_specs=[pl.BlockSpec(shape, index[name]) for shape, name in block_of_result],
            out_shape=[result_type(shape, dtype, axes) for shape, dtype in results],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_LIMIT
            ),
            cost_estimate=pl.CostEstimate(
                flops=products * 2 * self.tokens * self.vocab * wide,
                transcendentals=self.tokens * self.vocab,
                bytes_accessed=math.prod(grid)
                // grid[1]
                * grid[1]
                * self.operands[0].dtype.itemsize
                * wide
                * block_vocab,
            ),
            interpret=self.interpret,
            name=f"cross_entropy{kernel.__name__.removesuffix('_kernel')}",
        )(*operands)

    def forward(self, *, with_gradient: bool) -> list[Array]:
        """Log normalizer and label's logit, each [tokens, 1]; and [tokens, d], the mean embedding of the other words."""
        column, wide = (self.by_token[0], 1), (self.by_token[0], self.operands[0].shape[1])
        results = [((self.tokens, 1), jnp.float32)] * 2 + [
            (self.operands[0].shape, jnp.float32)
        ] * with_gradient
        blocks = [(column, "token")] * 2 + [(wide, "token")] * with_gradient
        scratch = [column] * 3 + [wide] * with_gradient
        return self._run(
            _forward_kernel,
            [],
            results,
            blocks,
            scratch,
            self.by_token,
            token_axis=0,
            with_gradient=with_gradient,
        )

    def weight_gradient(self, normalizer, factors, dtype) -> tuple[Array, Array | None]:
        """[vocab, d] in `dtype`, and the float32 [vocab] gradient of the bias if there is one."""
        block = self.by_vocab[1], self.operands[0].shape[1]
        results = [(self.operands[1].shape, dtype)] + [
            ((1, self.vocab), jnp.float32) for _ in self.bias
        ]
        out_blocks = [(block, "word")] + [((1, block[0]), "word_column") for _ in self.bias]
        columns = [normalizer, factors]
        gradient, *bias_gradient = self._run(
            _weight_kernel,
            columns,
            results,
            out_blocks,
            [block],
            self.by_vocab,
            token_axis=1,
            tokens=self.tokens,
        )
        return gradient[:, : self.width], bias_gradient[0][0] if bias_gradient else None


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
    """The loss alone. Labels are in [0, vocab), or negative for a token that does not count and whose weight is 0."""
    normalizer, at_label = _Call(hidden, vocab_weight, bias, labels, interpret).forward(
        with_gradient=False
    )
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
    """The loss and its gradients, each in the type of what it is the gradient of; `interpret` as in `pl.pallas_call`."""
    call = _Call(hidden, vocab_weight, bias, labels, interpret)
    normalizer, at_label, others = call.forward(with_gradient=True)
    losses = _losses(labels, normalizer, at_label, z_loss)
    weight, smooth = weights[:, None], 1.0 + 2.0 * z_loss * normalizer
    # The label's own share, c p[y] - 1 with c = 1 + 2 z lse, in a form that does not cancel where p[y] is near 1.
    share = jnp.expm1(at_label - normalizer) + (smooth - 1.0) * jnp.exp(at_label - normalizer)
    own = vocab_weight[jnp.maximum(labels, 0)].astype(hidden.dtype).astype(jnp.float32)
    d_hidden = weight * (smooth * others[:, : hidden.shape[1]] + share * own)
    factors = jnp.concatenate([weight * smooth, weight], axis=1)
    d_weight, d_bias = call.weight_gradient(normalizer, factors, vocab_weight.dtype)
    gradients = Gradients(
        hidden=d_hidden.astype(hidden.dtype),
        vocab_weight=d_weight,
        bias=None if bias is None else d_bias.astype(bias.dtype),
        weights=losses,
    )
    return jnp.sum(weights * losses), gradients
