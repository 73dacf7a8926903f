"""The order in which a kernel visits sorted rows: one step for each pair of a group and a tile that share rows.

Listing them is a separate kernel that loops over numbers in scalar memory. In jnp it would be a dozen operations, each of
which takes longer to start than to run.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from kernels_pallas.manual_axes import result_type, varying_axes


class Steps(NamedTuple):
    """The properties of each step, int32. Unused steps repeat the blocks of the last one, so that nothing is copied for them.

    Attributes:
        group: Its group; for rows without a group, that of the previous step.
        tile: Its tile.
        first: Its first row.
        last: The row after its last; ``first`` if the step has no rows.
        filled: Number of rows that belong to a group.
    """

    group: Int[Array, " steps"]
    tile: Int[Array, " steps"]
    first: Int[Array, " steps"]
    last: Int[Array, " steps"]
    filled: Int[Array, " 1"]


def make_steps(
    sizes: Int[Array, " groups"], rows: int, tile: int, *, interpret: Any = False
) -> Steps:
    """List the steps through rows that are sorted by group; rows after the last group come at the end.

    A tile has one step, plus one for each group that begins within it.

    Args:
        sizes: Number of rows of each group.
        rows: Total number of rows.
        tile: Number of rows per tile.
        interpret: As in ``pl.pallas_call``.

    Example:
        >>> import jax.numpy as jnp
        >>> steps = make_steps(jnp.array([3, 0, 2]), rows=8, tile=4, interpret=True)
        >>> [number.tolist() for number in steps[:4]]
        [[0, 2, 2, 2, 2], [0, 0, 1, 1, 1], [0, 3, 4, 5, 8], [3, 4, 5, 8, 8]]
    """
    most = pl.cdiv(rows, tile) + min(sizes.shape[0] + 1, rows) - 1
    axes = varying_axes(sizes)
    shapes = [(most,)] * 4 + [(1,)]
    numbers = pl.BlockSpec(memory_space=pltpu.SMEM)
    found = pl.pallas_call(
        functools.partial(_kernel, rows=rows, tile=tile),
        in_specs=[numbers],
        out_specs=[numbers] * 5,
        out_shape=[result_type(shape, jnp.int32, axes) for shape in shapes],
        interpret=interpret,
    )(sizes.astype(jnp.int32))
    return Steps(*found)


def _kernel(sizes_ref: Any, *steps_refs: Any, rows: int, tile: int) -> None:
    steps = Steps(*steps_refs)

    def write(step: Any, group: Any, number: Any, first: Any, last: Any) -> None:
        numbers = (group, number, first, last)
        for ref, value in zip(steps[:4], numbers, strict=True):
            ref[step] = value

    def add(state: Any, group: Any, first: Any, last: Any) -> Any:
        """Add a step for each tile of a group's rows."""
        before, step = state

        def one(number: Any, step: Any) -> Any:
            own = jnp.maximum(first, number * tile), jnp.minimum(last, (number + 1) * tile)
            write(step, group, number, *own)
            return step + 1

        # Not `//`, which also handles the sign.
        begin, end = jax.lax.div(first, tile), jax.lax.div(last + tile - 1, tile)
        step = jax.lax.fori_loop(begin, jnp.where(first < last, end, begin), one, step)
        return jnp.where(first < last, group, before), step

    def one_group(group: Any, state: Any) -> Any:
        state, first = state
        # Sizes larger than the number of rows must not write past the end.
        last = jnp.clip(first + sizes_ref[group], first, rows)
        return add(state, group, first, last), last

    start = (jnp.int32(0), jnp.int32(0)), jnp.int32(0)
    (group, step), filled = jax.lax.fori_loop(0, sizes_ref.shape[0], one_group, start)
    steps.filled[0] = filled
    _, step = add((group, step), group, filled, jnp.int32(rows))
    for_none = group, (rows - 1) // tile, rows, rows
    jax.lax.fori_loop(step, steps.tile.shape[0], lambda step, _: write(step, *for_none), None)
