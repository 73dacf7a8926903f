"""Plain jnp: the reference for the kernel, and the fallback if it does not support the operands."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Gating(NamedTuple):
    """The choice of each token; see ``kernels_pallas.top_k_gating``."""

    weights: Float[Array, "tokens k"]
    experts: Int[Array, "tokens k"]
    positions: Int[Array, "tokens k"]
    sizes: Int[Array, " experts"]


def top_k_gating(
    logits: Float[Array, "tokens experts"],
    used: Bool[Array, " tokens"] | None,
    *,
    k: int,
    normalize: bool,
) -> Gating:
    """See ``kernels_pallas.top_k_gating``."""
    num_tokens, num_experts = logits.shape
    probs = jax.nn.softmax(logits)
    # Without the barrier, XLA's CPU compiler may sort all experts of each token, which takes ten times as long.
    chosen = jax.lax.top_k(jax.lax.stop_gradient(logits), k)[1]
    experts = jax.lax.optimization_barrier(chosen)
    weights = jnp.take_along_axis(probs, experts, axis=1)
    if used is not None:
        experts = jnp.where(used[:, None], experts, num_experts)
        weights = jnp.where(used[:, None], weights, 0.0)
    if normalize:
        weights = weights / at_least_epsilon(weights.sum(1, keepdims=True))

    flat, items = experts.reshape(-1), num_tokens * k
    number = jnp.arange(items, dtype=jnp.int32)
    # Sorting expert and number as one value is three times as fast on a CPU.
    packs = (num_experts + 1) * items < 2**31
    order = jnp.sort(flat * items + number) % items if packs else jnp.argsort(flat, stable=True)
    sizes = (flat[:, None] == jnp.arange(num_experts)[None]).sum(0, dtype=jnp.int32)
    starts = jnp.append(jnp.cumsum(sizes) - sizes, 0)
    positions = (
        jnp.zeros(items, jnp.int32)
        .at[order]
        .set(number - starts[flat[order]], unique_indices=True)
        .reshape(num_tokens, k)
    )
    return Gating(weights, experts, jnp.where(experts < num_experts, positions, 0), sizes)


def at_least_epsilon(total: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return the divisor that makes weights add up to 1; the weights of padding are all zero."""
    return jnp.maximum(total, jnp.finfo(jnp.float32).eps)
