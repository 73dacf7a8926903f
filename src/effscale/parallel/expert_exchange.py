"""Exchange of tokens between devices that hold different experts: from the tokens' devices to the experts', and back.

Devices along the mesh axis of ``experts`` (``expert``, by the default rules) also share the batch. Before the exchange, each
has buffers for all experts; after it, each has the buffers of all devices for its own experts. This is an all-to-all.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from effscale.options import Options, PositiveInt
from effscale.parallel.rules import auto_batch_axes, constrain, current_rules
from kernels_pallas import dispatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange(Options):
    """How tokens are sent; results do not depend on it."""

    host_devices: PositiveInt | None = None
    """Number of devices per host along the expert axis, for an exchange in two stages: first within each host, then between hosts
    among devices with the same index. With p devices on hosts of G, each device sends G + p/G messages instead of p, but twice
    the bytes, which pays off if messages are small. None: one stage."""
    coordinated: bool = True
    """If devices along ``tensor`` hold the same tokens, let each send its share and gather the rest after the exchange, so that
    nothing is sent twice."""


def mesh_size(axis: str) -> int:
    """Return the number of devices along an axis of the current mesh; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape.get(axis, 1)


def expert_axes() -> tuple[str, ...]:
    """Return the axes of the current mesh over which experts are divided."""
    return tuple(axis for axis in current_rules().lookup("experts") if mesh_size(axis) > 1)


def check_experts(num_experts: int) -> None:
    """Raise a ValueError unless the experts can be divided over the devices of the current mesh."""
    axes = expert_axes()
    devices = math.prod(mesh_size(axis) for axis in axes)
    if num_experts % devices:
        more = (
            ", or divide the width of each expert over the axis 'tensor' to give it several devices"
        )
        raise ValueError(
            f"num_experts={num_experts} cannot be divided over the {devices} devices of the mesh axis {', '.join(axes)}. "
            f"Use a size that divides {num_experts}{more if devices > num_experts else ''}"
        )


def to_experts(
    x: Float[Array, "experts groups capacity d_model"], exchange: Exchange = Exchange()
) -> Float[Array, "_ _ capacity d_model"]:
    """Send the buffers of groups of tokens to the devices of their experts.

    Args:
        x: The buffers for all experts; groups are divided over the mesh like the batch.
        exchange: How tokens are sent.

    Returns:
        The same array, divided by experts and no longer by groups along the expert axis. Inside a ``jax.shard_map`` over that
        axis, where shapes are those of one device: this device's experts, and the groups of all devices.

    Example:
        >>> import jax.numpy as jnp
        >>> to_experts(jnp.ones((8, 1, 4, 16))).shape  # without a mesh nothing happens
        (8, 1, 4, 16)
    """
    return _exchange(x, exchange, there=True)


def to_tokens(
    x: Float[Array, "experts groups capacity d_model"], exchange: Exchange = Exchange()
) -> Float[Array, "_ _ capacity d_model"]:
    """Send the experts' outputs back to the tokens' devices: the inverse of ``to_experts``."""
    return _exchange(x, exchange, there=False)


def _exchange(x: Array, exchange: Exchange, *, there: bool) -> Array:
    mesh, experts = jax.sharding.get_abstract_mesh(), expert_axes()
    if not experts:
        return x
    local = lambda x: _all_to_all(x, experts, exchange.host_devices, there)
    if set(experts) <= set(mesh.manual_axes):
        return local(x)
    batch = auto_batch_axes(x.shape[1])
    if not set(experts) <= set(batch):
        # Too few groups to divide: all devices hold all tokens, and each uses those of its experts.
        return constrain(x, "experts" if there else None, None, None, None)
    tensor = _tensor_axes() if exchange.coordinated else ()
    capacity = x.shape[2]
    padding = -capacity % math.prod(mesh_size(axis) for axis in tensor)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0)))
    rest = tuple(axis for axis in batch if axis not in experts)
    by_group, by_expert = P(None, batch, tensor or None), P(experts, rest or None, tensor or None)
    specs = (by_group, by_expert) if there else (by_expert, by_group)
    names = {*batch, *tensor}
    x = jax.shard_map(local, in_specs=specs[0], out_specs=specs[1], axis_names=names)(x)
    whole = P(*(specs[1][:2]), None, None)
    return jax.lax.with_sharding_constraint(x, whole)[:, :, :capacity]


def _tensor_axes() -> tuple[str, ...]:
    """Return the axes that divide the width of an expert and along which devices hold the same tokens."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(
        axis
        for axis in current_rules().lookup("mlp_act")
        if mesh_size(axis) > 1 and types[axis] == AxisType.Auto
    )


def _all_to_all(x: Array, axes: tuple[str, ...], near: int | None, there: bool) -> Array:
    """Run the exchange as one device sees it: ``[all experts, own groups]`` to ``[own experts, all groups]``, or back."""
    axis: Any = axes[0] if len(axes) == 1 else axes
    if near is None or near == 1:
        split, joined = (0, 1) if there else (1, 0)
        return jax.lax.all_to_all(x, axis, split, joined, tiled=True)
    devices = math.prod(mesh_size(name) for name in axes)
    if devices % near:
        raise ValueError(
            f"Exchange.host_devices must divide the {devices} devices of the mesh axis {', '.join(axes)}, got {near}"
        )
    hosts = devices // near
    within = [[host * near + i for i in range(near)] for host in range(hosts)]
    between = [[host * near + i for host in range(hosts)] for i in range(near)]
    split = lambda a, at: a.reshape(
        *a.shape[:at], hosts, near, a.shape[at] // devices, *a.shape[at + 1 :]
    )
    # The block sent to, or received from, device host * near + i is x[host, i].
    x = split(x, 0) if there else jnp.moveaxis(split(x, 1), (1, 2), (0, 1))
    x = jax.lax.all_to_all(x, axis, 1, 1, tiled=True, axis_index_groups=within)
    x = jax.lax.all_to_all(x, axis, 0, 0, tiled=True, axis_index_groups=between)
    if there:
        x = jnp.moveaxis(x, (0, 1), (1, 2))  # [own experts, host, i, groups, ...]
        return x.reshape(x.shape[0], -1, *x.shape[4:])
    return x.reshape(-1, *x.shape[3:])


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
