"""Choice of the next token from logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from effscale.generation.config import SamplingConfig
from effscale.generation.processors import warp


def likeliest(logits: Float[Array, "batch vocab"]) -> Int[Array, "batch"]:
    """Return the first index of each row's maximum, like ``argmax``, by two plain reductions, which CPUs vectorize."""
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    last = logits.shape[-1] - 1
    return jnp.where(logits == logits.max(-1, keepdims=True), index, last).min(-1)


def choose(
    logits: Float[Array, "batch vocab"], config: SamplingConfig, key: PRNGKeyArray
) -> Int[Array, "batch"]:
    """Draw one token per row. The draw of a row depends on ``key`` and its index, not on the other rows.

    Args:
        logits: Unnormalized log-probabilities, after everything that is applied before the temperature.
        config: Temperature and filters.
        key: Unused if greedy.

    Returns:
        Token ids, int32.
    """
    if config.greedy:
        return likeliest(logits)
    logits = warp(logits, config)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
