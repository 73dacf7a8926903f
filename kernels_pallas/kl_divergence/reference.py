"""A plain implementation of the divergence, with the whole logits of both models."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.cross_entropy.reference import logits_of
from kernels_pallas.kl_divergence.output import Output


def token_divergences(
    student: Output, teacher: Output, temperature: float
) -> Float[Array, " tokens"]:
    """Return the divergence of each token, in nats, at softened logits."""
    own, other = (
        jax.nn.log_softmax(logits_of(o.hidden, o.vocab_weight, o.bias) / temperature)
        for o in (student, teacher)
    )
    probability = jnp.exp(other)
    # A token that the teacher excludes, with a logit of minus infinity, contributes nothing.
    return jnp.where(probability > 0, probability * (other - own), 0.0).sum(-1)


def reference(
    student: Output, teacher: Output, weights: Float[Array, " tokens"], temperature: float
) -> Float[Array, ""]:
    """Return the weighted sum; see ``kernels_pallas.kl_divergence``."""
    return (weights * token_divergences(student, teacher, temperature)).sum()
