"""One chunk of tokens at a time in plain jnp: the implementation for CPUs, and the fallback elsewhere.

Logits exist for only one chunk of tokens. If gradients are needed, they are computed in the same
pass. This is possible because the loss is a sum, so its cotangent is a single number that scales the
gradients later. It takes three matrix products instead of the usual four with recomputation, and
one exponential per logit.

For a token with logits ``l``, label ``y`` and weight ``w``, with ``m = max(l)``, ``p = exp(l - m)``,
``s = sum(p)`` and ``lse = m + log(s)``,

    loss    = w (lse - l[y] + z lse²)
    dloss/dl = w ((1 + 2 z lse) p / s - onehot(y))

The subtraction in the last line is done in float32 before rounding to the dtype of the matrix products,
so a token that the model predicts with confidence keeps its small gradient in bfloat16.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.manual_axes import vary, varying_axes

# Measured on CPUs: smaller chunks make slower products, larger ones leave the cache. If the sums of
# the weight's gradient exceed the cache themselves, each chunk needs another pass over them.
_CHUNK, _CHUNK_OF_LARGE = 256, 512
_LARGE_WEIGHT = 2**24


class Gradients(NamedTuple):
    """The gradients that the forward pass computes, for a cotangent of 1."""

    hidden: Float[Array, "tokens d"]
    vocab_weight: Float[Array, "vocab d"]
    bias: Float[Array, " vocab"] | None
    weights: Float[Array, " tokens"]
    """The loss of each token, which is the gradient of its weight."""


class Tile(NamedTuple):
    """The losses of one chunk, and the gradient of its logits as ``scale[:, None] * direction``."""

    losses: Float[Array, " chunk"]
    direction: Float[Array, "chunk vocab"]
    scale: Float[Array, " chunk"]


TileFunction = Callable[
    [Float[Array, "chunk vocab"], Int[Array, " chunk"], Float[Array, " chunk"]], Tile
]


def chunk_size(tokens: int, target: int) -> int:
    """Return the number of tokens per chunk: at most ``target``, and a divisor of ``tokens`` if one is near."""
    fewest = max(math.ceil(tokens / target), 1)
    chunks = next((n for n in range(fewest, 2 * fewest) if tokens % n == 0), fewest)
    return max(math.ceil(tokens / chunks), 1)


def _chunk(hidden: Array, vocab_weight: Array, target: int | None) -> int:
    if target is None:
        target = _CHUNK if vocab_weight.size <= _LARGE_WEIGHT else _CHUNK_OF_LARGE
    return chunk_size(hidden.shape[0], target)


def split_tokens(values: Array, chunk: int, fill: int = 0) -> Array:
    """Reshape [tokens, ...] to [chunks, chunk, ...]; a chunk takes every ``chunks``-th token.

    The stride matters if a mesh shards the tokens: each chunk is then spread evenly over all devices,
    while a chunk of neighboring tokens would be on one of them.
    """
    chunks = math.ceil(values.shape[0] / chunk)
    padding = [(0, chunks * chunk - values.shape[0])] + [(0, 0)] * (values.ndim - 1)
    if padding[0][1]:
        values = jnp.pad(values, padding, constant_values=fill)
    return values.reshape(chunk, chunks, *values.shape[1:]).swapaxes(0, 1)


def _join(values: Array, tokens: int) -> Array:
    return values.swapaxes(0, 1).reshape(-1, *values.shape[2:])[:tokens]


def _matmul(left: Array, right: Array, contract: tuple[int, int]) -> Array:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _logits(hidden: Array, weight: Array, bias: Array | None) -> Array:
    logits = _matmul(hidden, weight, (1, 1))
    return logits if bias is None else logits + bias.astype(jnp.float32)[None, :]


def token_losses(logits: Array, labels: Array, log_normalizer: Array, z_loss: float) -> Array:
    """Return the loss of each token, 0 for a negative label."""
    at_label = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[:, None], axis=1)[:, 0]
    losses = log_normalizer - at_label
    if z_loss:
        losses = losses + z_loss * log_normalizer**2
    return jnp.where(labels >= 0, losses, 0.0)


def softmax_tile(logits: Array, labels: Array, weights: Array, *, z_loss: float) -> Tile:
    """Return the losses and logit gradients of one chunk; both are 0 for a negative label, whose weight is 0."""
    peak = jnp.max(logits, axis=1)
    unnormalized = jnp.exp(logits - peak[:, None])
    total = jnp.sum(unnormalized, axis=1)
    log_normalizer = peak + jnp.log(total)
    is_label = jax.lax.broadcasted_iota(labels.dtype, logits.shape, 1) == labels[:, None]
    if z_loss:
        # The factor can be zero, so it cannot be divided out of the label's entry as below.
        probability = unnormalized * ((1.0 + 2.0 * z_loss * log_normalizer) / total)[:, None]
        direction, scale = jnp.where(is_label, probability - 1.0, probability), weights
    else:
        # The division by `total` is left to the [chunk] vector, which saves one pass over the chunk's
        # logits.
        direction = jnp.where(is_label, unnormalized - total[:, None], unnormalized)
        scale = weights / total
    return Tile(token_losses(logits, labels, log_normalizer, z_loss), direction, scale)


def chunked_loss(
    hidden: Float[Array, "tokens d"],
    vocab_weight: Float[Array, "vocab d"],
    bias: Float[Array, " vocab"] | None,
    labels: Int[Array, " tokens"],
    weights: Float[Array, " tokens"],
    *,
    z_loss: float = 0.0,
    chunk_tokens: int | None = None,
) -> Float[Array, ""]:
    """Compute only the loss. Labels are in [0, vocab), or negative for a token that does not count."""
    chunk = _chunk(hidden, vocab_weight, chunk_tokens)
    weight = vocab_weight.astype(hidden.dtype)

    def step(_, inputs):
        hidden, labels, weights = inputs
        logits = _logits(hidden, weight, bias)
        losses = token_losses(logits, labels, jax.nn.logsumexp(logits, axis=1), z_loss)
        return None, jnp.sum(weights * losses)

    inputs = (
        split_tokens(hidden, chunk),
        split_tokens(labels, chunk, fill=-1),
        split_tokens(weights, chunk),
    )
    return jnp.sum(jax.lax.scan(step, None, inputs)[1])


def chunked_loss_and_gradients(
    hidden: Float[Array, "tokens d"],
    vocab_weight: Float[Array, "vocab d"],
    bias: Float[Array, " vocab"] | None,
    labels: Int[Array, " tokens"],
    weights: Float[Array, " tokens"],
    *,
    z_loss: float = 0.0,
    chunk_tokens: int | None = None,
    tile: TileFunction | None = None,
) -> tuple[Float[Array, ""], Gradients]:
    """Compute the loss and its gradients in one pass; the gradients have the dtypes of their operands.

    Args:
        hidden: Final hidden states.
        vocab_weight: The output projection in the layout of an embedding table.
        bias: Bias of the logits, or None.
        labels: In [0, vocab), or negative for a token that does not count and has weight 0.
        weights: Weight of each token.
        z_loss: Coefficient of the squared log normalizer.
        chunk_tokens: Number of tokens per chunk; None chooses one for CPUs.
        tile: Function that computes losses and gradients from the logits of a chunk; None: ``softmax_tile``.
    """
    tokens, chunk = hidden.shape[0], _chunk(hidden, vocab_weight, chunk_tokens)
    dtype = hidden.dtype
    weight = vocab_weight.astype(dtype)
    make_tile = tile or (lambda *inputs: softmax_tile(*inputs, z_loss=z_loss))

    def step(sums, inputs):
        hidden, labels, weights = inputs
        losses, direction, scale = make_tile(_logits(hidden, weight, bias), labels, weights)
        narrow = direction.astype(dtype)
        d_hidden = _matmul(narrow, weight, (1, 0)) * scale[:, None]
        scaled_hidden = (hidden.astype(jnp.float32) * scale[:, None]).astype(dtype)
        d_weight, d_bias = sums
        d_weight = d_weight + _matmul(narrow, scaled_hidden, (0, 0))
        if d_bias is not None:
            d_bias = d_bias + scale @ direction.astype(jnp.float32)
        return (d_weight, d_bias), (d_hidden.astype(dtype), losses)

    inputs = (
        split_tokens(hidden, chunk),
        split_tokens(labels, chunk, fill=-1),
        split_tokens(weights, chunk),
    )
    zeros = (
        jnp.zeros(weight.shape, jnp.float32),
        None if bias is None else jnp.zeros(bias.shape, jnp.float32),
    )
    zeros = vary(zeros, varying_axes(inputs, weight, bias))
    (d_weight, d_bias), (d_hidden, losses) = jax.lax.scan(step, zeros, inputs)
    losses = _join(losses, tokens)
    gradients = Gradients(
        hidden=_join(d_hidden, tokens),
        vocab_weight=d_weight.astype(vocab_weight.dtype),
        bias=None if bias is None else d_bias.astype(bias.dtype),
        weights=losses,
    )
    return jnp.sum(weights * losses), gradients
