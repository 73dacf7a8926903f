"""Run the experts of a layer on their tokens: with buffers, with sorted rows, or one token after another.

Each function maps groups of tokens with their routing to the weighted sums of the experts' outputs. Only buffers also
return values captured at the points of the experts, since only with buffers the position of a row identifies its expert.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from effscale.models import Context
from effscale.moe.dispatch import by_expert, dropless, one_hot, table
from effscale.moe.dispatch.dropless_exchange import exchanged
from effscale.moe.expert_choice import ExpertChoice
from effscale.moe.routing import Routing
from effscale.moe.sorted_experts import run_sorted
from effscale.parallel import (
    Exchange,
    auto_batch_axes,
    check_experts,
    expert_axes,
    to_experts,
    to_tokens,
)
from kernels_pallas import dispatch as kernels


def each_group(function: Callable[..., Any], *operands: Any) -> Any:
    """Apply ``function`` to each group: to the operands without their leading dimension of groups.

    A single group, the usual case on one device, does not use ``vmap``: gathers with a batch dimension are several times
    slower on CPUs.
    """
    groups = jax.tree.leaves(operands)[0].shape[0]
    if groups > 1:
        return jax.vmap(function)(*operands)
    only = jax.tree.map(lambda a: a[0], operands)
    return jax.tree.map(lambda a: a[None], function(*only))


def by_buffers(
    experts: Any,
    tokens: Float[Array, "groups tokens d_model"],
    routing: Routing | ExpertChoice,
    context: Context,
    key: PRNGKeyArray | None,
    *,
    by: str,
    exchange: Exchange,
) -> tuple[Float[Array, "groups tokens d_model"], dict[str, Array]]:
    """Run experts on the tokens in their buffers, on different devices if the mesh divides experts.

    Args:
        experts: A feed-forward with stacked parameters.
        tokens: The groups of tokens.
        routing: The routing of each group.
        context: The context of the tokens; experts must not use their positions.
        key: The key in training.
        by: How to move tokens into the buffers, ``table`` or ``one_hot``, unless experts chose them.
        exchange: How to exchange tokens between devices.

    Returns:
        The sums, and captured values with a leading expert dimension.
    """
    chosen = isinstance(routing, ExpertChoice)
    module: Any = by_expert if chosen else {"table": table, "one_hot": one_hot}[by]
    check_experts(routing.sizes.shape[-1])
    buffers = each_group(module.dispatch, tokens, routing)
    rows = to_experts(buffers.swapaxes(0, 1), exchange)
    num_experts, groups, capacity, d_model = rows.shape
    rows = rows.reshape(num_experts, 1, groups * capacity, d_model)
    keys = None if key is None else jax.random.split(key, num_experts)
    run = lambda expert, rows, key: expert(rows, context, key)
    y, captured = jax.vmap(run)(experts, rows, keys)
    y = to_tokens(y.reshape(num_experts, groups, capacity, d_model), exchange)
    return each_group(module.combine, y.swapaxes(0, 1), routing), captured


def by_sorted_rows(
    experts: Any,
    tokens: Float[Array, "groups tokens d_model"],
    routing: Routing,
    context: Context,
    key: PRNGKeyArray | None,
) -> Float[Array, "groups tokens d_model"]:
    """Run experts on tokens sorted by expert, without a capacity: nothing is dropped.

    TPUs have a kernel that multiplies each row by its own expert's weights; on other platforms
    ``effscale.moe.sorted_experts.run_sorted`` does. Each device sorts the tokens of its own groups. If the mesh divides
    experts, rows are sent to them and back.
    """
    check_experts(routing.sizes.shape[-1])
    batch, divided = auto_batch_axes(tokens.shape[0]), expert_axes()
    manual = bool(divided) and set(divided) <= set(jax.sharding.get_abstract_mesh().manual_axes)
    travels = manual or (bool(divided) and set(divided) <= set(batch))
    items = routing.order.shape[-1]

    def one(experts: nnx.Module, tokens: Array, routing: Routing) -> Any:
        def work(rows: Array, sizes: Array) -> Array:
            if kernels.platform() == "tpu" and dropless.can_be_grouped(experts):
                own: Any = dropless.grouped_experts(experts, sizes)
                return own(rows[None], context, key)[0][0]
            return run_sorted(experts, rows, sizes, context, key, expected_rows=items)

        rows = dropless.dispatch(tokens, routing)
        if travels:
            made = exchanged(rows, routing.sizes, work, divided)
        else:
            made = work(rows, routing.sizes)
        return dropless.combine(made, routing)

    def own_groups(experts: nnx.Module, tokens: Array, routing: Routing) -> Any:
        return jax.lax.map(lambda group: one(experts, *group), (tokens, routing))

    if not batch:
        return own_groups(experts, tokens, routing)
    specs = (P(divided) if travels and not manual else P(), P(batch), P(batch))
    names = set(batch)
    run = jax.shard_map(own_groups, in_specs=specs, out_specs=P(batch), axis_names=names)
    return run(experts, tokens, routing)


def one_by_one(
    experts: Sequence[Any],
    tokens: Float[Array, "1 tokens d_model"],
    routing: Routing,
    context: Context,
) -> Float[Array, "groups tokens d_model"]:
    """Run each choice of each token in turn, so that only the weights of chosen experts are read.

    Args:
        experts: The experts, each with its own arrays.
        tokens: The tokens of a single group.
        routing: The routing of the group, with the leading dimension of groups.
        context: The context of the tokens.
    """
    k = routing.experts.shape[-1]
    # An item without a place goes to a branch after the last, which does nothing.
    chosen = jnp.where(routing.kept, routing.experts, len(experts)).reshape(-1)
    weights = routing.weights.reshape(-1).astype(tokens.dtype)
    nothing = lambda x: jnp.zeros_like(x)
    branches = [(lambda x, e=expert: e(x[None], context, None)[0][0]) for expert in experts]

    def item(i: Array, y: Array) -> Array:
        x = jax.lax.dynamic_slice_in_dim(tokens[0], i // k, 1)
        made = weights[i] * jax.lax.switch(chosen[i], [*branches, nothing], x)
        before = jax.lax.dynamic_slice_in_dim(y, i // k, 1)
        return jax.lax.dynamic_update_slice_in_dim(y, before + made, i // k, 0)

    y = jnp.zeros_like(tokens[0])
    return jax.lax.fori_loop(0, chosen.shape[0], item, y)[None]
