"""An all-to-all of pieces of different lengths, on all platforms."""

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
    """Send a piece of each device's rows to each other device along an axis: ``jax.lax.ragged_all_to_all`` on all platforms.

    On TPUs and GPUs it is that function. On other platforms, which XLA does not support, pieces are padded to the length of
    the whole operand.

    Args:
        operand: The rows that this device sends.
        output: The array that this device receives into; rows that no device sends to are unchanged.
        input_offsets: Start of the piece for each device in the operand.
        send_sizes: Number of rows of each piece.
        output_offsets: Start of the piece in the output of the *receiving* device.
        recv_sizes: Number of rows to receive from each device.
        axis_name: A manual mesh axis.

    Returns:
        The output with the received rows.
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
    """Do the same with an all-to-all of pieces that are all as long as the operand."""
    rows, number = operand.shape[0], jnp.arange(operand.shape[0])[None]
    index = jnp.minimum(input_offsets[:, None] + number, rows - 1)
    inside = number < send_sizes[:, None]
    pieces = jnp.where(_wide(inside, operand), operand[index], jnp.zeros((), operand.dtype))
    exchange = lambda a: jax.lax.all_to_all(a, axis_name, 0, 0, tiled=True)
    pieces, offsets = exchange(pieces), exchange(output_offsets)
    # Rows that were not sent are written past the end, where they are dropped.
    places = jnp.where(number < recv_sizes[:, None], offsets[:, None] + number, output.shape[0])
    flat = pieces.reshape(-1, *operand.shape[1:])
    return output.at[places.reshape(-1)].set(flat, mode="drop")


def _wide(mask: Array, like: Array) -> Array:
    """Return a mask over rows with one more dimension for each dimension of a row."""
    return mask.reshape(*mask.shape, *(1,) * (like.ndim - 1))
