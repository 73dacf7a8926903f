"""Run the experts of a layer on their tokens: with buffers, with sorted rows, or one token after another.

Each function maps groups of tokens with their routing to the weighted sums of the experts' outputs. Only buffers also
return values captured at the points of the experts, since only with buffers the position of a row identifies its expert.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from effscale.models import Context
from effscale.moe.dispatch import (
    can_be_grouped,
    combine_sorted,
    exchanged,
    from_buffers,
    from_buffers_one_hot,
    grouped_experts,
    sort_tokens,
    to_buffers,
    to_buffers_one_hot,
)
from effscale.moe.routing import ExpertChoice, Routing
from effscale.parallel import Exchange
from effscale.parallel.expert_exchange import check_experts, expert_axes, to_experts, to_tokens
from effscale.parallel.rules import auto_batch_axes
from kernels_pallas import dispatch as kernels
from kernels_pallas.grouped_matmul.places import Places
from kernels_pallas.manual_axes import vary, varying_axes


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
    move, back = to_buffers, from_buffers
    if by == "one_hot":
        move, back = to_buffers_one_hot, from_buffers_one_hot
    check_experts(routing.sizes.shape[-1])
    buffers = each_group(move, tokens, routing)
    rows = to_experts(buffers.swapaxes(0, 1), exchange)
    num_experts, groups, capacity, d_model = rows.shape
    rows = rows.reshape(num_experts, 1, groups * capacity, d_model)
    keys = None if key is None else jax.random.split(key, num_experts)
    run = lambda expert, rows, key: expert(rows, context, key)
    y, captured = jax.vmap(run)(experts, rows, keys)
    y = to_tokens(y.reshape(num_experts, groups, capacity, d_model), exchange)
    return each_group(back, y.swapaxes(0, 1), routing), captured


def by_sorted_rows(
    experts: Any,
    tokens: Float[Array, "groups tokens d_model"],
    routing: Routing,
    context: Context,
    key: PRNGKeyArray | None,
) -> Float[Array, "groups tokens d_model"]:
    """Run experts on tokens sorted by expert, without a capacity: nothing is dropped.

    TPUs have a kernel that multiplies each row by its own expert's weights; on other platforms
    ``run_sorted`` does. Each device sorts the tokens of its own groups. If the mesh divides
    experts, rows are sent to them and back.
    """
    check_experts(routing.sizes.shape[-1])
    batch, divided = auto_batch_axes(tokens.shape[0]), expert_axes()
    manual = bool(divided) and set(divided) <= set(jax.sharding.get_abstract_mesh().manual_axes)
    travels = manual or (bool(divided) and set(divided) <= set(batch))
    items = routing.order.shape[-1]

    def one(experts: nnx.Module, tokens: Array, routing: Routing) -> Any:
        def work(rows: Array, sizes: Array) -> Array:
            if kernels.platform() == "tpu" and can_be_grouped(experts):
                own: Any = grouped_experts(experts, sizes)
                return own(rows[None], context, key)[0][0]
            return run_sorted(experts, rows, sizes, context, key, expected_rows=items)

        rows = sort_tokens(tokens, routing)
        if travels:
            made = exchanged(rows, routing.sizes, work, divided)
        else:
            made = work(rows, routing.sizes)
        return combine_sorted(made, routing)

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


def run_sorted(
    experts: nnx.Module,
    rows: Float[Array, "rows d_model"],
    sizes: Int[Array, "experts"],
    context: Context,
    key: PRNGKeyArray | None,
    *,
    expected_rows: int,
) -> Float[Array, "rows d_model"]:
    """Return the output of each row's expert, for sorted rows without a capacity.

    Each expert has a buffer for its even share, and all buffers are processed as one batch. Rows beyond an expert's share are
    processed one tile at a time. So the cost is that of capacity factor 1, and a little more for each row above it; nothing
    is dropped.

    Args:
        experts: A feed-forward of any kind, with stacked parameters.
        rows: The rows of expert 0, then those of expert 1, and so on. Rows after those of the last expert give zeros.
        sizes: The number of rows of each expert.
        context: The context of the tokens; experts must not use their positions.
        key: The key in training.
        expected_rows: The approximate number of rows that belong to an expert. It affects only the speed.
    """
    # In a shard_map a gradient must vary like its operand.
    experts, rows, sizes = vary((experts, rows, sizes), varying_axes(experts, rows, sizes))
    share = math.ceil(expected_rows / sizes.shape[0])
    return _run(experts, rows, sizes, context, key, share)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _run(experts: Any, rows: Any, sizes: Any, context: Any, key: Any, share: int) -> Array:
    return _forward(experts, rows, sizes, context, key, share)[0]


def _forward(
    experts: Any, rows: Array, sizes: Array, context: Context, key: Any, share: int
) -> tuple[Array, Any]:
    places = Places(sizes, rows.shape[0], share)
    run = functools.partial(_all_experts, context, key)
    made, back = jax.vjp(run, experts, places.buffers(rows))
    padded = places.pad(rows)

    def step(tile: Array, y: Array) -> Array:
        expert, at, own = places.tile(tile)
        found = _one_expert(context, key, tile, _part(experts, expert), places.cut(padded, at, own))
        return places.put(y, found, at, own)

    y = places.loop(step, places.pad(places.rows(made)))
    return y[: rows.shape[0]], (back, experts, rows, sizes, context, key)


def _backward(share: int, kept: Any, g: Array) -> tuple[Any, ...]:
    back, experts, rows, sizes, context, key = kept
    places = Places(sizes, rows.shape[0], share)
    to_experts, to_buffers = back(places.buffers(g))
    padded, padded_g = places.pad(rows), places.pad(g)
    # Integers, such as those of packed weights, have gradients without values, which a loop cannot carry.
    leaves, structure = jax.tree.flatten(to_experts)
    numbers = [i for i, leaf in enumerate(leaves) if leaf.dtype != jax.dtypes.float0]

    def step(tile: Array, carry: Any) -> Any:
        sums, to_rows = carry
        expert, at, own = places.tile(tile)
        run = functools.partial(_one_expert, context, key, tile)
        given = places.cut(padded, at, own)
        _, back = jax.vjp(run, _part(experts, expert), given)
        more, to_given = back(places.cut(padded_g, at, own))
        more = jax.tree.leaves(more)
        sums = [total.at[expert].add(more[i]) for total, i in zip(sums, numbers, strict=True)]
        return sums, places.put(to_rows, to_given, at, own)

    start = [leaves[i] for i in numbers], places.pad(places.rows(to_buffers))
    sums, to_rows = places.loop(step, start)
    for i, total in zip(numbers, sums, strict=True):
        leaves[i] = total
    return jax.tree.unflatten(structure, leaves), to_rows[: rows.shape[0]], None, None, None


_run.defvjp(_forward, _backward)


def _all_experts(
    context: Context, key: Any, experts: Any, buffers: Float[Array, "experts share d_model"]
) -> Float[Array, "experts share d_model"]:
    keys = None if key is None else jax.random.split(key, buffers.shape[0])
    run = lambda expert, rows, key: expert(rows[None], context, key)[0][0]
    return jax.vmap(run)(experts, buffers, keys)


def _one_expert(
    context: Context, key: Any, tile: Array, expert: Any, rows: Float[Array, "tile d_model"]
) -> Float[Array, "tile d_model"]:
    # A separate random stream, as `split` creates those of the buffers.
    own = None if key is None else jax.random.fold_in(jax.random.fold_in(key, 1), tile)
    return expert(rows[None], context, own)[0][0]


def _part(experts: Any, number: Array) -> Any:
    return jax.tree.map(lambda a: a[number], experts)
