"""Attention in plain jnp, following the formula; it holds all scores at the same time, in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.attention.alibi import Alibi

_MASKED = -1e30


def reference(
    query: Float[Array, "batch heads seq head_dim"],
    keys: Float[Array, "batch kv_heads seq head_dim"],
    values: Float[Array, "batch kv_heads seq head_dim"],
    *,
    causal: bool,
    segments: Int[Array, "batch seq"] | None = None,
    alibi: Alibi | None = None,
) -> Float[Array, "batch heads seq head_dim"]:
    """Compute the same as ``kernels_pallas.attention``."""
    batch, heads, seq, width = query.shape
    grouped = (batch, keys.shape[1], heads // keys.shape[1], seq)
    scores = jnp.einsum(
        "bkgqd,bksd->bkgqs",
        query.reshape(*grouped, width),
        keys,
        preferred_element_type=jnp.float32,
    ).reshape(batch, heads, seq, seq)
    if alibi is not None:
        positions = jnp.asarray(alibi.positions)[:, None, None].astype(jnp.float32)
        scores = scores + jnp.asarray(alibi.slopes)[None, :, None, None] * positions
    allowed = jnp.ones((1, 1, seq, seq), bool)
    if causal:
        allowed = jnp.tril(allowed)
    if segments is not None:
        allowed = allowed & (segments[:, None, :, None] == segments[:, None, None, :])
    weights = jax.nn.softmax(jnp.where(allowed, scores, _MASKED), axis=-1).astype(values.dtype)
    mixed = jnp.einsum(
        "bkgqs,bksd->bkgqd",
        weights.reshape(*grouped, seq),
        values,
        preferred_element_type=jnp.float32,
    )
    return mixed.reshape(query.shape).astype(query.dtype)
