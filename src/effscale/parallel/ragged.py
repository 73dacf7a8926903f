"""An all-to-all of pieces of different lengths, everywhere."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from kernels_pallas import dispatch


def ragged_all_to_all(
    operand: Shaped[Array, "rows *row"],
    output: Shaped[Array, "rows_out *row"],
    input_offsets: Int[Array, " devices"],
    send_sizes: Int[Array, " devices"],
    output_offsets: Int[Array, " devices"],
    recv_sizes: Int[Array, " devices"],
    *,
    axis_name: Any,
) -> Shaped[Array, "rows_out *row"]:
    """Each device along an axis sends a piece of its rows to each other: ``jax.lax.ragged_all_to_all``, also where XLA has none.

    On TPUs and GPUs it is that function. Elsewhere pieces are sent padded to the length of the whole operand.

    Args:
        operand: What this device sends from.
        output: What this device receives into; rows that nobody sends to stay as they are.
        input_offsets: Where the piece for each device begins in the operand.
        send_sizes: Its number of rows.
        output_offsets: Where it goes in *that device's* output.
        recv_sizes: How many rows come from each device.
        axis_name: A manual mesh axis.

    Returns:
        The output with the rows that were received.
    """
    operands = (operand, output, input_offsets, send_sizes, output_offsets, recv_sizes)
    if dispatch.platform() in ("tpu", "cuda"):
        return jax.lax.ragged_all_to_all(*operands, axis_name=axis_name)
    return padded(*operands, axis_name=axis_name)


def padded(
    operand: Array,
    output: Array,
    input_offsets: Array,
    send_sizes: Array,
    output_offsets: Array,
    recv_sizes: Array,
    *,
    axis_name: Any,
) -> Array:
    """The same by an all-to-all of pieces that are all as long as the operand."""
    rows, number = operand.shape[0], jnp.arange(operand.shape[0])[None]
    index = jnp.minimum(input_offsets[:, None] + number, rows - 1)
    inside = number < send_sizes[:, None]
    pieces = jnp.where(_wide(inside, operand), operand[index], jnp.zeros((), operand.dtype))
    exchange = lambda a: jax.lax.all_to_all(a, axis_name, 0, 0, tiled=True)
    pieces, offsets = exchange(pieces), exchange(output_offsets)
    # Rows that were not sent go past the end, where they are dropped.
    places = jnp.where(number < recv_sizes[:, None], offsets[:, None] + number, output.shape[0])
    flat = pieces.reshape(-1, *operand.shape[1:])
    return output.at[places.reshape(-1)].set(flat, mode="drop")


def _wide(mask: Array, like: Array) -> Array:
    """A mask over rows with a dimension for each of a row's."""
    return mask.reshape(*mask.shape, *(1,) * (like.ndim - 1))
