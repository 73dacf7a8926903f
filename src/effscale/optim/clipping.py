"""Clipping by a norm of the gradients, before and after workers go their own ways."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from effscale.optim.averaging import mean
from effscale.optim.options import check_number
from effscale.optim.precision import in_float32
from effscale.parallel.workers import (
    as_local,
)

Clip = Literal["synchronised", "local"]
"""By which norm gradients are clipped. ``synchronised``: the root mean square over workers of their norms, one number for all,
also where gradients are averaged; so nothing changes when that ends. It is more than the norm of the mean, up to the root of
the number of workers where noise decides. ``local``: as in DeepSpeed the norm of the mean, and once gradients are no longer
averaged each worker's own: where that is more and binds, the steps become smaller from then on."""


def squared_norm(tree: Any) -> jax.Array:
    """Sum of squares of all entries, in float32."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return sum(squares, start=jnp.zeros((), jnp.float32))


def mean_squared_norm(gradients: Any, axis_name: str | None) -> jax.Array:
    """The mean over workers of `squared_norm`: finite only if all gradients of all workers are."""
    square = squared_norm(gradients)
    return square if axis_name is None else jax.lax.pmean(as_local(square, axis_name), axis_name)


def clipped(gradients: Any, squared: jax.Array, clip_norm: Any) -> Any:
    """The gradients times what makes a norm of ``sqrt(squared)`` at most ``clip_norm``."""
    if clip_norm is None:
        return gradients
    factor = clip_norm / jnp.maximum(jnp.sqrt(squared), clip_norm)
    return jax.tree.map(lambda g: (g.astype(jnp.float32) * factor).astype(g.dtype), gradients)


def clipped_locally(gradients: Any, axis_name: str | None, clip_norm: Any, clip: Clip) -> Any:
    """Clip the gradient of each worker, by the norm that `Clip` says."""
    if clip_norm is None:
        return gradients
    by_all = clip == "synchronised"
    squared = mean_squared_norm(gradients, axis_name) if by_all else squared_norm(gradients)
    return clipped(gradients, squared, clip_norm)


def clipped_mean(gradients: Any, axis_name: str | None, clip_norm: Any, clip: Clip) -> Any:
    """The mean over workers, uncompressed, in float32 at least, clipped by the norm that `Clip` says."""
    g = in_float32(mean(gradients, axis_name))
    if clip_norm is None:
        return g
    by_all = clip == "synchronised"
    squared = mean_squared_norm(gradients, axis_name) if by_all else squared_norm(g)
    return clipped(g, squared, clip_norm)


def check_clip(clip_norm: Any, clip: str) -> None:
    """Raise a ``ValueError`` for options out of range."""
    check_number("clip_norm", clip_norm, lambda c: c > 0, "be positive; None does not clip")
    if clip not in get_args(Clip):
        raise ValueError(f"clip={clip!r} is unknown; one of {', '.join(get_args(Clip))}")
