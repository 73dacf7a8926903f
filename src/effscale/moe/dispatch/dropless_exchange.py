"""Exchange of sorted tokens with the devices of their experts and back: all of them, without dropping or padding.

The functions describe what one device along the expert axis does, inside a `jax.shard_map`.
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
    """Return the outputs of the experts on all devices for the rows of this device.

    The receive buffer has room for all rows of all devices, as all of them might choose the same expert.

    Args:
        rows: Rows sorted by expert. Rows after those of the last expert are not sent, and their result is zero.
        sizes: The number of rows for each expert.
        work: A function from rows sorted by this device's experts, and the number of rows of each, to their outputs.
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
    """Return the order that sorts rows by expert which are sorted by sender and then by expert, and its inverse."""
    ends = jnp.cumsum(counts.reshape(-1))
    block = (jnp.arange(rows)[:, None] >= ends[None]).sum(1)
    # Rows that no device sent belong to a block and an expert after the last.
    expert = jnp.where(block < ends.shape[0], block % counts.shape[1], counts.shape[1])
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)
    inverse = jnp.zeros(rows, jnp.int32).at[order].set(jnp.arange(rows, dtype=jnp.int32))
    return order, inverse
