"""A kernel for each device's rows and heads, with a custom gradient.

The custom gradient is around two ``jax.shard_map``s, one for each pass, instead of inside one: of the forms that were
tried, only this one also works inside another, checked ``jax.shard_map``. The two are unchecked, because splash does not
declare what its results vary over; the types are restored outside.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from kernels_pallas.manual_axes import vary, varying_axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The static part of a call."""

    kernel: Any
    """The module ``tpu`` or ``gpu``."""
    causal: bool
    rows: tuple[str, ...] = ()
    """Mesh axes that divide the batch."""
    heads: tuple[str, ...] = ()
    """Mesh axes that divide the heads, of the queries and of the keys."""


def auto_axes() -> tuple[str, ...]:
    """Return the axes of the current mesh that the compiler partitions over."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in pairs if kind == AxisType.Auto)


def dividing(axes: Sequence[str], size: int) -> tuple[str, ...]:
    """Return those of the axes that the compiler partitions over and that divide what earlier axes left of ``size``."""
    chosen, sizes = [], jax.sharding.get_abstract_mesh().shape
    for axis in axes:
        if axis in auto_axes() and sizes[axis] > 1 and size % sizes[axis] == 0:
            chosen.append(axis)
            size //= sizes[axis]
    return tuple(chosen)


def fused(
    plan: Plan,
    query: Float[Array, "batch heads seq wide"],
    keys: Float[Array, "batch kv_heads seq wide"],
    values: Float[Array, "batch kv_heads seq head_dim"],
    segments: Int[Array, "batch seq"] | None,
) -> Float[Array, "batch heads seq head_dim"]:
    """Compute attention with the plan's kernel. Differentiable once, in query, keys and values."""
    # If the axes divide only the query's heads, keys are copied so that each device has those of its queries.
    ways = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in plan.heads)
    copies = math.lcm(keys.shape[1], ways) // keys.shape[1]
    if copies > 1:
        keys, values = (jnp.repeat(x, copies, axis=1) for x in (keys, values))
    operands = (query, keys, values, segments)
    return _attend(plan, *vary(operands, varying_axes(operands)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, query, keys, values, segments):
    return _attend_forward(plan, query, keys, values, segments)[0]


def _attend_forward(plan, query, keys, values, segments):
    run = functools.partial(plan.kernel.forward, causal=plan.causal)
    heads, rows = P(plan.rows, plan.heads), P(plan.rows)
    operands = (query, keys, values, segments)
    results = _on_each_device(run, (heads, heads, heads, rows), (heads, heads))(*operands)
    out, normalizer = vary(results, varying_axes(query))
    return out, (*operands, out, normalizer)


def _attend_backward(plan, kept, cotangent):
    run = functools.partial(plan.kernel.backward, causal=plan.causal)
    heads, rows = P(plan.rows, plan.heads), P(plan.rows)
    specs = (heads, heads, heads, rows, heads, heads, heads)
    gradients = _on_each_device(run, specs, (heads, heads, heads))(*kept, cotangent)
    return *vary(gradients, varying_axes(kept)), None


_attend.defvjp(_attend_forward, _attend_backward)


def _on_each_device(function: Any, in_specs: Any, out_specs: Any) -> Any:
    axes = auto_axes()
    if not axes:
        return function
    return jax.shard_map(
        function, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes), check_vma=False
    )
