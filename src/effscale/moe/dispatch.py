"""Move tokens to their experts and back: into buffers, or sorted by expert without buffers.

Sorted tokens (as in MegaBlocks) leave experts without a limit. They then read rows, each of which belongs to one of them. Any
feed-forward made of ``effscale.models.Dense`` can do so: ``grouped_experts`` replaces its stacked kernels by weights that
multiply each row by the part of its expert.
"""

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from effscale.models import finish, map_weights
from effscale.models.weights import dense
from effscale.moe.routing import ExpertChoice, Routing
from effscale.parallel.expert_exchange import ragged_all_to_all
from kernels_pallas import grouped_matmul


@jax.custom_vjp
def rows_of_items(
    x: Float[Array, "tokens width"], slots: Int[Array, "tokens k"], items: Int[Array, "rows"]
) -> Float[Array, "rows width"]:
    """Return the token of the item in each row.

    Args:
        x: The tokens.
        slots: The row of each item; ``rows`` or more if it has none.
        items: The item of each row, ``token * k + choice``; ``tokens * k`` if the row is empty, which gives zeros.
    """
    return _take(x, items // slots.shape[1])


rows_of_items.defvjp(
    lambda x, slots, items: (rows_of_items(x, slots, items), slots),
    lambda slots, g: (_take(g, slots).sum(1), None, None),
)


@jax.custom_vjp
def items_of_rows(
    y: Float[Array, "rows width"], slots: Int[Array, "tokens k"], items: Int[Array, "rows"]
) -> Float[Array, "tokens k width"]:
    """Return the row of each item, with zeros for items without a row. Arguments as in ``rows_of_items``."""
    return _take(y, slots)


items_of_rows.defvjp(
    lambda y, slots, items: (items_of_rows(y, slots, items), items),
    lambda items, g: (_take(g.reshape(-1, g.shape[-1]), items), None, None),
)


def _take(a: Array, index: Array) -> Array:
    """Return rows of ``a``, with zeros for indices beyond the last."""
    inside = (index < a.shape[0])[..., None]
    return jnp.where(inside, a[jnp.minimum(index, a.shape[0] - 1)], 0)


def to_buffers(
    x: Float[Array, "tokens d_model"], routing: Routing | ExpertChoice
) -> Float[Array, "experts capacity d_model"]:
    """Return the tokens in the buffers of their experts; empty rows are zero.

    A table of positions says where each token goes: DeepSpeed-MoE's "dense mapping table", instead of one-hot products.
    """
    if isinstance(routing, ExpertChoice):
        return x.at[routing.tokens].get(mode="fill", fill_value=0)
    rows = rows_of_items(x, *_table(routing))
    return rows.reshape(routing.num_experts, -1, x.shape[1])


def from_buffers(
    y: Float[Array, "experts capacity d_model"], routing: Routing | ExpertChoice
) -> Float[Array, "tokens d_model"]:
    """Return the weighted sum of the experts' outputs for each token."""
    if isinstance(routing, ExpertChoice):
        weighted = y * routing.weights[..., None].astype(y.dtype)
        zeros = jnp.zeros((routing.num_tokens, y.shape[-1]), y.dtype)
        return zeros.at[routing.tokens].add(weighted, mode="drop")
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


def to_buffers_one_hot(
    x: Float[Array, "tokens d_model"], routing: Routing
) -> Float[Array, "experts capacity d_model"]:
    """Do the same by products with one-hot arrays, as GShard and DeepSpeed do: the reference.

    Their time and memory grow with the square of the number of tokens.
    """
    mask = _one_hot(routing).sum(1)
    return jnp.einsum("tec,td->ecd", mask.astype(x.dtype), x)


def from_buffers_one_hot(
    y: Float[Array, "experts capacity d_model"], routing: Routing
) -> Float[Array, "tokens d_model"]:
    """Do the same by products with one-hot arrays."""
    weights = jnp.einsum("tkec,tk->tec", _one_hot(routing), routing.weights)
    return jnp.einsum("tec,ecd->td", weights.astype(y.dtype), y)


def _one_hot(routing: Routing) -> Float[Array, "tokens k experts capacity"]:
    capacity = routing.buffer_rows
    expert = jax.nn.one_hot(routing.experts, routing.num_experts)
    place = jax.nn.one_hot(jnp.where(routing.kept, routing.positions, capacity), capacity)
    return expert[..., None] * place[:, :, None]


def sort_tokens(
    x: Float[Array, "tokens d_model"], routing: Routing
) -> Float[Array, "items d_model"]:
    """Return the token of each item, sorted by expert; padding comes last."""
    return rows_of_items(x, _rows(routing), routing.order)


def combine_sorted(
    y: Float[Array, "items d_model"], routing: Routing
) -> Float[Array, "tokens d_model"]:
    """Return the weighted sum of the experts' outputs for each token."""
    found = items_of_rows(y, _rows(routing), routing.order)
    return (found * routing.weights[..., None].astype(y.dtype)).sum(1)


def _rows(routing: Routing) -> Int[Array, "tokens k"]:
    """Return the position of each item in ``order``; beyond the last for padding, which goes to no expert."""
    rows = jnp.append(routing.starts, 0)[routing.experts] + routing.positions
    return jnp.where(routing.experts < routing.num_experts, rows, routing.order.shape[0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # JAX also creates it from shapes and placeholders
class GroupedWeight:
    """A stack of weights that multiplies sorted rows, each by the weight of its group; see ``effscale.models.Weight``.

    Attributes:
        weight: The weights of all groups.
        sizes: The number of rows in each group.
    """

    weight: Float[Array, "groups d_in d_out"]
    sizes: Int[Array, "groups"]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one group's weight."""
        return tuple(self.weight.shape[1:])

    @property
    def dtype(self) -> Any:
        """The type in which it computes."""
        return self.weight.dtype

    def astype(self, dtype: Any) -> "GroupedWeight":
        """Return the same weights, computing in ``dtype``."""
        return dataclasses.replace(self, weight=self.weight.astype(dtype))

    def matmul(self, x: Any, bias: Any, activation: Any) -> Array:
        """Return ``activation(x W + b)`` with the weight of each row's group, and a bias of shape ``(groups, d_out)``."""
        weight = dense(self.weight).astype(x.dtype)
        return finish(grouped_matmul(x, weight, self.sizes, bias), None, activation)


def grouped_experts(experts: nnx.Module, sizes: Int[Array, "experts"]) -> nnx.Module:
    """Return a stack of experts that reads sorted rows, each of which belongs to one of them.

    Args:
        experts: A feed-forward with stacked parameters, all of them kernels and biases of ``effscale.models.Dense``.
        sizes: The number of rows of each expert.

    Raises:
        ValueError: The experts have another parameter, which cannot be selected by row.
    """
    others = _others(experts)
    if others:
        raise ValueError(
            f"grouped_experts needs experts of only dense layers, got {', '.join(others)}"
        )
    return map_weights(experts, lambda weight: GroupedWeight(weight, sizes))


def can_be_grouped(experts: nnx.Module) -> bool:
    """Return whether ``grouped_experts`` accepts the experts: only dense layers, with plain arrays."""
    weights = (variable.get_value() for _, variable in nnx.to_flat_state(nnx.state(experts)))
    return not _others(experts) and all(isinstance(weight, jax.Array) for weight in weights)


def _others(experts: nnx.Module) -> list[str]:
    """Return the parameters that are not a kernel or bias of a dense layer."""
    return [
        ".".join(map(str, path))
        for path, _ in nnx.to_flat_state(nnx.state(experts))
        if path[-1] not in ("kernel", "bias")
    ]


Work = Callable[[Float[Array, "rows d_model"], Int[Array, "experts"]], Float[Array, "rows d_model"]]


def exchanged(
    rows: Float[Array, "items d_model"],
    sizes: Int[Array, "all_experts"],
    work: Work,
    axis_name: Any,
) -> Float[Array, "items d_model"]:
    """Return the outputs of the experts on all devices for the rows of this device, one along the expert axis of a ``jax.shard_map``.

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
