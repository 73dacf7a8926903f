"""Move tokens to experts and back by products with one-hot arrays of shape [tokens, experts, capacity]: the reference.

GShard and DeepSpeed do it this way. The time and memory of the products grow with the square of the number of tokens;
``effscale.moe.dispatch.table`` computes the same.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effscale.moe.routing import Routing


def dispatch(
    x: Float[Array, "tokens d_model"], routing: Routing
) -> Float[Array, "experts capacity d_model"]:
    """Return the tokens in the buffers of their experts; empty rows are zero."""
    mask = _one_hot(routing).sum(1)
    return jnp.einsum("tec,td->ecd", mask.astype(x.dtype), x)


def combine(
    y: Float[Array, "experts capacity d_model"], routing: Routing
) -> Float[Array, "tokens d_model"]:
    """Return the weighted sum of the experts' outputs for each token."""
    weights = jnp.einsum("tkec,tk->tec", _one_hot(routing), routing.weights)
    return jnp.einsum("tec,ecd->td", weights.astype(y.dtype), y)


def _one_hot(routing: Routing) -> Float[Array, "tokens k experts capacity"]:
    capacity = routing.buffer_rows
    expert = jax.nn.one_hot(routing.experts, routing.num_experts)
    place = jax.nn.one_hot(jnp.where(routing.kept, routing.positions, capacity), capacity)
    return expert[..., None] * place[:, :, None]
