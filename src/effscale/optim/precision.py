"""Types of arrays: moments and means are stored in at least float32, updates have the type of what they are added to."""

from typing import Any

import jax
import jax.numpy as jnp


def zeros_of_mean(x: Any) -> jax.Array:
    """Return zeros like an array, with a type that is the same on all workers."""
    sharding = jax.typeof(x).sharding  # for axes of type Explicit; empty for all others
    divided = any(entry is not None for entry in sharding.spec)
    return jnp.zeros(jnp.shape(x), x.dtype, device=sharding if divided else None)


def at_least_float32(dtype: Any) -> Any:
    """Return the type, or float32 if it is narrower."""
    return jnp.float32 if jnp.dtype(dtype).itemsize < 4 else dtype


def in_float32(tree: Any) -> Any:
    """Return the tree in at least float32."""
    return jax.tree.map(lambda x: x.astype(at_least_float32(x.dtype)), tree)


def in_types_of(like: Any, tree: Any) -> Any:
    """Return the tree in the types of another."""
    return jax.tree.map(lambda a, x: x.astype(a.dtype), like, tree)
