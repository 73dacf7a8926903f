"""Sharding constraints by logical name, inside models."""

import math

import jax
from jax.sharding import AxisType
from jaxtyping import Array, Shaped

from effscale.parallel.rules import current_rules, spec_over


def constrain(x: Shaped[Array, "*shape"], *names: str | None) -> Shaped[Array, "*shape"]:
    """Say how an activation lies on the mesh, by the logical names of its dimensions.

    The identity when no mesh is set (``jax.set_mesh``) or it has one device. Inside ``jax.shard_map`` only the
    axes that are still automatic count, so a model runs unchanged under a technique that takes ``data`` into
    its own hands.

    Args:
        x: the array.
        *names: one logical name a dimension; None (or a name whose rule is None) for a dimension that is
            whole on every device.

    Returns:
        ``x``, constrained.

    Raises:
        ValueError: not one name a dimension, or a name without a rule.

    >>> import jax.numpy as jnp
    >>> constrain(jnp.ones((8, 16)), "batch", "mlp_act").shape
    (8, 16)
    """
    if len(names) != x.ndim:
        raise ValueError(
            f"constrain got {len(names)} names {names} for an array of shape {x.shape}: give one a dimension"
        )
    rules = current_rules()
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        for name in names:
            rules.lookup(name)  # a misspelt name is an error on one device too
        return x
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    sizes = {axis: size for axis, size in mesh.shape.items() if types[axis] == AxisType.Auto}
    spec = spec_over(names, x.shape, sizes, mesh.axis_names, rules)
    if all(size == 1 for size in sizes.values()):
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def auto_batch_axes(rows: int) -> tuple[str, ...]:
    """The axes of the mesh in use that divide ``rows`` rows of a batch and that the compiler still partitions.

    For operations that a technique or kernel takes over by ``jax.shard_map``: they are the axes to take.

    Args:
        rows: rows of the global batch.

    Returns:
        Names of axes, outermost first; none without a mesh, or where the axes do not divide ``rows``.

    >>> auto_batch_axes(8)
    ()
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    axes = tuple(
        axis
        for axis in current_rules().lookup("batch")
        if mesh.shape.get(axis, 1) > 1 and types[axis] == AxisType.Auto
    )
    return axes if rows % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()
