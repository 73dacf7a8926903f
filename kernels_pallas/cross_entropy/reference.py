"""A plain implementation of the loss with whole logits, for comparison with the others."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def logits_of(
    hidden: Float[Array, "tokens d"],
    vocab_weight: Float[Array, "vocab d"],
    bias: Float[Array, " vocab"] | None,
) -> Float[Array, "tokens vocab"]:
    """Compute ``hidden @ vocab_weight.T + bias``: operands in the dtype of ``hidden``, sums in float32."""
    logits = jnp.einsum(
        "td,vd->tv", hidden, vocab_weight.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    return logits if bias is None else logits + bias.astype(jnp.float32)[None, :]


def reference(
    hidden: Float[Array, "tokens d"],
    vocab_weight: Float[Array, "vocab d"],
    bias: Float[Array, " vocab"] | None,
    labels: Int[Array, " tokens"],
    weights: Float[Array, " tokens"],
    *,
    z_loss: float = 0.0,
) -> Float[Array, ""]:
    """Sum the weighted losses; see ``kernels_pallas.cross_entropy`` for the arguments."""
    vocab = vocab_weight.shape[0]
    logits = logits_of(hidden, vocab_weight, bias)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    known = (labels >= 0) & (labels < vocab)
    at_label = jnp.take_along_axis(logits, jnp.where(known, labels, 0)[:, None], axis=-1)[:, 0]
    losses = log_normalizer - at_label + z_loss * log_normalizer**2
    return jnp.sum(jnp.where(known, weights * losses, 0.0))
