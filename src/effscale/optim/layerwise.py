"""Norms per layer, also for layers that are stacked in one array."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effscale.optim.options import check_bounds
from effscale.training.partition import NamedLeaf, named_leaves

Stacked = Any
"""The number of leading dimensions of each array that stack separate tensors: a tree of integers like the parameters,
or one integer for all. None counts the dimensions that the logical axes of an ``nnx.Variable`` do not name, and the
leading ones named ``layers`` and ``experts``; it is zero for any other array."""


def stacked_dims(params: Any, stacked: Stacked = None) -> Any:
    """Return a tree of integers like the parameters; see `Stacked`."""
    leaves, structure = jax.tree.flatten(params)
    if isinstance(stacked, int):
        dims = [stacked] * len(leaves)
    elif stacked is None:
        dims = [_unnamed(leaf) for leaf in named_leaves(params)]
    else:
        dims = jax.tree.leaves(stacked)
        if len(dims) != len(leaves):
            raise ValueError(
                f"stacked must have one entry for each of the {len(leaves)} arrays, got {len(dims)}"
            )
    for x, dim in zip(leaves, dims, strict=True):
        if not 0 <= dim <= jnp.ndim(x):
            raise ValueError(
                f"stacked must be from 0 to {jnp.ndim(x)} for an array of shape {jnp.shape(x)}, got {dim}"
            )
    return jax.tree.unflatten(structure, dims)


def _unnamed(leaf: NamedLeaf) -> int:
    if leaf.axes is None:
        return 0
    return max(0, jnp.ndim(leaf.leaf) - len(leaf.axes)) + leaf.stacked


def layer_shape(x: Any, dims: int) -> tuple[int, ...]:
    """Return the shape with one number per layer that broadcasts against the array."""
    return (*jnp.shape(x)[:dims], *(1,) * (jnp.ndim(x) - dims))


def norms(x: jax.Array, dims: int) -> jax.Array:
    """Return the L2 norm of each layer, in float32, with the shape of `layer_shape`."""
    axes = tuple(range(dims, x.ndim))
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes, keepdims=True))


class TrustRatio(NamedTuple):
    """The bounds of LAMB's coefficient, with DeepSpeed's names and values."""

    max_coeff: Any = 10.0
    min_coeff: Any = 0.01

    def __call__(self, params: Any, update: Any, dims: int) -> jax.Array:
        """Return the norm of the parameters divided by that of the update, clipped to the bounds; one where it is not `defined`."""
        p, u = norms(params, dims), norms(update, dims)
        ratio = jnp.clip(p / jnp.where(u > 0, u, 1.0), self.min_coeff, self.max_coeff)
        return jnp.where(self.defined(params, update, dims), ratio, 1.0)

    def defined(self, params: Any, update: Any, dims: int) -> jax.Array:
        """Return whether neither norm is zero."""
        return (norms(params, dims) > 0) & (norms(update, dims) > 0)

    def check(self) -> None:
        """Raise a ``ValueError`` for invalid bounds."""
        low, high = ("min_coeff", self.min_coeff), ("max_coeff", self.max_coeff)
        check_bounds(low, high, 0.0, "be ordered and not negative")
