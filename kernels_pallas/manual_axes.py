"""Types of arrays inside ``jax.shard_map``: which manual mesh axes a value varies over.

A ``jax.shard_map`` with its checks on types every array by the mesh axes along which it differs. Loops
need a carry whose type does not change, and kernels need explicit result types. Both take one line
with the functions here, which do nothing outside a ``jax.shard_map``.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array


def varying_axes(*values: Any) -> frozenset[str]:
    """Return the manual mesh axes that at least one of ``values`` (pytrees of arrays) varies over."""
    types = [jax.typeof(leaf).manual_axis_type for leaf in jax.tree.leaves(values)]
    return frozenset().union(*(t.varying for t in types))


def vary(value: Any, axes: Sequence[str] | frozenset[str]) -> Any:
    """Mark the arrays in ``value`` as varying over ``axes``; gradients are summed over those added."""

    def mark(leaf: Array) -> Array:
        missing = tuple(sorted(set(axes) - jax.typeof(leaf).manual_axis_type.varying))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, value)


def result_type(shape: tuple[int, ...], dtype: Any, axes: frozenset[str]) -> jax.ShapeDtypeStruct:
    """Return the type of a kernel's result that varies over ``axes``."""
    kind = jax.sharding.ManualAxisType(varying=axes) if axes else None
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)
