"""Run experts on sorted rows without a capacity: a buffer for the even share of each expert, and a loop over the rest.

With an even load nearly all rows are in the buffers, which all experts process as one batch. Rows beyond an expert's
share are processed one tile at a time. So the cost is that of capacity factor 1, and a little more for each row above it;
nothing is dropped.
"""

import functools
import math
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from effscale.models import Context
from kernels_pallas.grouped_matmul.places import Places
from kernels_pallas.manual_axes import vary, varying_axes


def run_sorted(
    experts: nnx.Module,
    rows: Float[Array, "rows d_model"],
    sizes: Int[Array, "experts"],
    context: Context,
    key: PRNGKeyArray | None,
    *,
    expected_rows: int,
) -> Float[Array, "rows d_model"]:
    """Return the output of each row's expert.

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
