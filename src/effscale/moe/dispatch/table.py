"""Move tokens to experts and back by a table of positions: DeepSpeed-MoE's "dense mapping table", instead of one-hot products."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effscale.moe.dispatch.gathers import items_of_rows, rows_of_items
from effscale.moe.routing import Routing


def dispatch(
    x: Float[Array, "tokens d_model"], routing: Routing
) -> Float[Array, "experts capacity d_model"]:
    """Return the tokens in the buffers of their experts; empty rows are zero."""
    rows = rows_of_items(x, *_table(routing))
    return rows.reshape(routing.num_experts, -1, x.shape[1])


def combine(
    y: Float[Array, "experts capacity d_model"], routing: Routing
) -> Float[Array, "tokens d_model"]:
    """Return the weighted sum of the experts' outputs for each token."""
    found = items_of_rows(y.reshape(-1, y.shape[-1]), *_table(routing))
    return (found * routing.weights[..., None].astype(y.dtype)).sum(1)


def _table(routing: Routing) -> tuple[Int[Array, "tokens k"], Int[Array, "rows"]]:
    """Return the row of each item in the concatenated buffers of all experts, and the item of each row."""
    capacity, items = routing.buffer_rows, routing.order.shape[0]
    slots = routing.experts * capacity + routing.positions
    slots = jnp.where(routing.kept, slots, routing.num_experts * capacity)
    place = jnp.arange(capacity, dtype=jnp.int32)[None]
    at = jnp.minimum(routing.starts[:, None] + place, items - 1)
    return slots, jnp.where(place < routing.sizes[:, None], routing.order[at], items).reshape(-1)
