"""Sorted tokens that travel to the devices of their experts and back, as many as there are: nothing is dropped or padded.

What one device along the expert axis does, inside a `jax.shard_map`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effscale.moe.dispatch.gathers import items_of_rows, rows_of_items
from effscale.parallel.ragged import ragged_all_to_all

Work = Callable[[Float[Array, "rows d_model"], Int[Array, "experts"]], Float[Array, "rows d_model"]]


def exchanged(
    rows: Float[Array, "items d_model"],
    sizes: Int[Array, "all_experts"],
    work: Work,
    axis_name: Any,
) -> Float[Array, "items d_model"]:
    """What the experts of all devices make of this device's rows.

    The buffer for what is received has room for all rows of all devices, as one expert might be everybody's choice.

    Args:
        rows: Sorted by expert; rows after the last expert's stay at home and come back as zeros.
        sizes: How many each expert gets.
        work: From rows that are sorted by this device's experts, and how many each has, to what they make of them.
        axis_name: The mesh axis over which experts are divided, in order.
    """
    devices, here = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    own = sizes.shape[0] // devices
    everybody = jax.lax.all_gather(sizes, axis_name)  # [devices, all experts]
    sent = everybody.reshape(devices, devices, own).sum(-1)  # from, to
    starts = jnp.cumsum(sent, axis=1) - sent  # of a piece in its sender's rows
    places = jnp.cumsum(sent, axis=0) - sent  # and in its receiver's buffer
    there = (starts[here], sent[here], places[here], sent[:, here])
    back = (places[:, here], sent[:, here], starts[:, here], sent[here])

    buffer = jnp.zeros((devices * rows.shape[0], rows.shape[1]), rows.dtype)
    received = ragged_all_to_all(rows, buffer, *there, axis_name=axis_name)
    mine = jax.lax.dynamic_slice_in_dim(everybody, here * own, own, 1)  # [devices, own]
    order, back_order = _by_expert(mine, received.shape[0])
    sorted_rows = rows_of_items(received, back_order[:, None], order)
    made = work(sorted_rows, mine.sum(0))
    made = items_of_rows(made, back_order[:, None], order)[:, 0]
    return ragged_all_to_all(made, jnp.zeros_like(rows), *back, axis_name=axis_name)


def _by_expert(
    counts: Int[Array, "devices experts"], rows: int
) -> tuple[Int[Array, "rows"], Int[Array, "rows"]]:
    """Return the order in which rows that lie by sender, and there by expert, lie by expert; and its inverse."""
    ends = jnp.cumsum(counts.reshape(-1))
    block = (jnp.arange(rows)[:, None] >= ends[None]).sum(1)
    # Rows that nobody sent belong to a block after the last, and to an expert after the last.
    expert = jnp.where(block < ends.shape[0], block % counts.shape[1], counts.shape[1])
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)
    inverse = jnp.zeros(rows, jnp.int32).at[order].set(jnp.arange(rows, dtype=jnp.int32))
    return order, inverse
