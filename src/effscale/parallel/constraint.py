"""Sharding constraints by logical name, inside models."""

import math

import jax
from jax.sharding import AxisType
from jaxtyping import Array, Shaped

from effscale.parallel.rules import current_rules, spec_over


def constrain(x: Shaped[Array, "*shape"], *names: str | None) -> Shaped[Array, "*shape"]:
    """Constrain the sharding of an activation by the logical names of its dimensions.

    This returns ``x`` itself if no mesh is set (``jax.set_mesh``) or the mesh has one device. Inside ``jax.shard_map``, only
    the axes that are still automatic apply, so a model runs unchanged under a technique that handles ``data`` manually.

    Args:
        x: The array.
        *names: One logical name per dimension; None (or a name whose rule is None) for a dimension that is not sharded.

    Returns:
        ``x``, constrained.

    Raises:
        ValueError: The number of names differs from the number of dimensions, or a name has no rule.

    >>> import jax.numpy as jnp
    >>> constrain(jnp.ones((8, 16)), "batch", "mlp_act").shape
    (8, 16)
    """
    if len(names) != x.ndim:
        raise ValueError(
            f"names must have one entry for each dimension of an array of shape {x.shape}, got {len(names)}: {names}"
        )
    rules = current_rules()
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        for name in names:
            rules.lookup(name)  # a misspelled name is an error on one device, too
        return x
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    sizes = {axis: size for axis, size in mesh.shape.items() if types[axis] == AxisType.Auto}
    spec = spec_over(names, x.shape, sizes, mesh.axis_names, rules)
    if all(size == 1 for size in sizes.values()):
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def auto_batch_axes(rows: int) -> tuple[str, ...]:
    """Return the mesh axes that divide ``rows`` rows of a batch and that the compiler still partitions.

    They are the axes to use for an operation that a technique or kernel runs in ``jax.shard_map``.

    Args:
        rows: Number of rows of the global batch.

    Returns:
        Names of axes, outermost first; empty without a mesh, or if the axes do not divide ``rows``.

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
