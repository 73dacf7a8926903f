"""How the next token is chosen from logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from effscale.generation.config import SamplingConfig
from effscale.generation.processors import warp


def likeliest(logits: Float[Array, "batch vocab"]) -> Int[Array, "batch"]:
    """The first index of each row's maximum, as ``argmax``: as two plain reductions, which CPUs run in vectors."""
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    last = logits.shape[-1] - 1
    return jnp.where(logits == logits.max(-1, keepdims=True), index, last).min(-1)


def choose(
    logits: Float[Array, "batch vocab"], config: SamplingConfig, key: PRNGKeyArray
) -> Int[Array, "batch"]:
    """Draws one token a row. A row's draw depends on ``key`` and its index, not on the other rows.

    Args:
        logits: Unnormalized log-probabilities, with all that acts before the temperature done.
        config: Temperature and filters.
        key: Not used when greedy.

    Returns:
        Token ids, int32.
    """
    if config.greedy:
        return likeliest(logits)
    logits = warp(logits, config)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
