"""Tokens sorted by expert, without buffers of a fixed size, so that experts have no limit (as in MegaBlocks).

The experts then read rows, each of which belongs to one of them. Any feed-forward made of ``effscale.models.Dense`` can do so:
``grouped_experts`` replaces its stacked kernels by weights that multiply each row by the part of its expert.
"""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from effscale.models import dense, finish, map_weights
from effscale.moe.dispatch.gathers import items_of_rows, rows_of_items
from effscale.moe.routing import Routing
from kernels_pallas import grouped_matmul


def dispatch(x: Float[Array, "tokens d_model"], routing: Routing) -> Float[Array, "items d_model"]:
    """Return the token of each item, sorted by expert; padding comes last."""
    return rows_of_items(x, _rows(routing), routing.order)


def combine(y: Float[Array, "items d_model"], routing: Routing) -> Float[Array, "tokens d_model"]:
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
