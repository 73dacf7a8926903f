"""Clipping by the norm of the gradients, before and after workers diverge."""

from typing import Any

import jax
import jax.numpy as jnp

from effscale.optim.averaging import mean
from effscale.optim.precision import in_float32
from effscale.parallel.workers import as_local
from effscale.training.clipping import Clip


def squared_norm(tree: Any) -> jax.Array:
    """Return the sum of squares of all entries, in float32."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return sum(squares, start=jnp.zeros((), jnp.float32))


def mean_squared_norm(gradients: Any, axis_name: str | None) -> jax.Array:
    """Return the mean over workers of `squared_norm`: finite only if all gradients of all workers are finite."""
    square = squared_norm(gradients)
    return square if axis_name is None else jax.lax.pmean(as_local(square, axis_name), axis_name)


def clipped_locally(gradients: Any, axis_name: str | None, clip: Clip | None) -> Any:
    """Clip the gradient of each worker by the norm that ``clip.by`` selects."""
    if clip is None:
        return gradients
    by_all = clip.by == "synchronised"
    squared = mean_squared_norm(gradients, axis_name) if by_all else squared_norm(gradients)
    return _scaled(gradients, clip.factor(jnp.sqrt(squared)))


def clipped_mean(gradients: Any, axis_name: str | None, clip: Clip | None) -> Any:
    """Return the mean over workers, uncompressed, in float32 at least, clipped by the norm that ``clip.by`` selects."""
    g = in_float32(mean(gradients, axis_name))
    if clip is None:
        return g
    by_all = clip.by == "synchronised"
    squared = mean_squared_norm(gradients, axis_name) if by_all else squared_norm(g)
    return _scaled(g, clip.factor(jnp.sqrt(squared)))


def _scaled(tree: Any, factor: jax.Array) -> Any:
    return jax.tree.map(lambda g: (g.astype(jnp.float32) * factor).astype(g.dtype), tree)
