"""Cross entropy over the vocabulary for any head weight, without materializing all logits."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effscale.models import Weight, matmul
from effscale.models.weights import transpose
from kernels_pallas import cross_entropy
from kernels_pallas.cross_entropy.chunked import chunk_size, split_tokens, token_losses

# The number of tokens whose logits exist at the same time.
CHUNK = 512


def vocabulary_cross_entropy(
    hidden: Float[Array, "tokens width"],
    weight: Any,
    labels: Int[Array, "tokens"],
    *,
    weights: Float[Array, "tokens"],
    bias: Float[Array, "vocab"] | None,
    z_loss: float,
    token_axes: Sequence[str],
) -> Float[Array, ""]:
    """Return the cross entropy over the vocabulary: `kernels_pallas.cross_entropy`, extended to structured weights.

    A structured weight (packed, or a LoRA pair) is never made dense: its ``matmul`` method computes the logits, in the type of
    ``hidden``. They are summed in float32, and computed again in the backward pass.

    Args:
        hidden: The input of the head.
        weight: Any weight of shape ``(vocab, width)``.
        labels: Labels in ``[0, vocab)``; any other label is ignored if its weight is 0.
        weights: The weight of each token.
        bias: The bias of the logits, or None.
        z_loss: The coefficient of the squared log normalizer.
        token_axes: The mesh axes that shard the tokens. Only plain arrays use them; for structured weights the compiler decides.
    """
    if not isinstance(weight, Weight):
        return cross_entropy(
            hidden,
            weight,
            labels,
            weights=weights,
            bias=bias,
            z_loss=z_loss,
            token_axes=token_axes,
        )
    project = transpose(weight)

    @jax.checkpoint
    def sum_of_chunk(inputs: tuple[Array, Array, Array]) -> Array:
        hidden, labels, weights = inputs
        logits = matmul(hidden, project).astype(jnp.float32)
        if bias is not None:
            logits = logits + bias.astype(jnp.float32)[None]
        losses = token_losses(logits, labels, jax.nn.logsumexp(logits, axis=1), z_loss)
        return jnp.sum(weights * losses)

    chunk = chunk_size(hidden.shape[0], CHUNK)
    labels = jnp.where((labels >= 0) & (labels < weight.shape[0]), labels, -1)
    chunks = tuple(split_tokens(x, chunk) for x in (hidden, labels, weights))
    return jax.lax.map(sum_of_chunk, chunks).sum()
