"""Momentum and variance: initialization, updates and normalization."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from effscale.optim.precision import at_least_float32
from effscale.parallel.onebit.layout import check_real


def averaged_moments(mean: Any, mu: Any, nu: Any, b1: Any, b2: Any) -> tuple[Any, Any]:
    """Return momentum and variance after a step of the warmup, from the mean gradient in at least float32."""
    return lerp(mu, mean, b1), lerp(nu, jax.tree.map(jnp.square, mean), b2)


def moments_like(params: Any, dtype: DTypeLike | None = None) -> Any:
    """Return zeros in a given type, or in at least float32.

    In a narrower type, second moments that decay by 0.999 would not change.
    """
    check_real(params)
    type_of = lambda p: at_least_float32(p.dtype) if dtype is None else dtype
    return jax.tree.map(lambda p: jnp.zeros_like(p, type_of(p)), params)


def check_mu_dtype(mu_dtype: DTypeLike | None) -> None:
    """Raise a ``ValueError`` for a type that cannot store a momentum."""
    if mu_dtype is not None and not jnp.issubdtype(mu_dtype, jnp.floating):
        raise ValueError(f"mu_dtype must be a floating-point type, or None, got {mu_dtype!r}")


def bias_correction(decay: Any, count: jax.Array) -> jax.Array:
    """Return ``1 - decay**count``, the divisor that corrects an average that started at zero after ``count`` updates, as in Adam."""
    return 1 - decay ** count.astype(jnp.float32)


def corrected(moments: Any, correction: Any) -> Any:
    """Return the moments divided by their `bias_correction`."""
    return jax.tree.map(lambda m: m / correction.astype(m.dtype), moments)


def where_known(mu: Any, nu: Any) -> Any:
    """Return the momentum, and zero where the variance is zero.

    One bit cannot represent zero. A parameter without a gradient would receive plus or minus the scale, divided only by epsilon.
    """
    return jax.tree.map(lambda m, v: jnp.where(v > 0, m, jnp.zeros_like(m)), mu, nu)


def normalised(mu: Any, nu: Any, eps: Any) -> Any:
    """Return the momentum divided by the root of the variance. Zero divided by zero is zero, also without epsilon, as there was no gradient."""
    return mu / jnp.where(nu > 0, jnp.sqrt(nu) + eps, 1.0)


def lerp(old: Any, new: Any, decay: Any) -> Any:
    """Return ``decay * old + (1 - decay) * new`` in the type of ``old``."""
    return jax.tree.map(lambda a, b: decay * a + (1 - decay) * b.astype(a.dtype), old, new)


def masked(tree: Any, mask: Any, params: Any) -> Any:
    """Multiply a tree by a mask: None, or a tree of arrays that broadcast against it, or a function from the parameters to one."""
    if mask is None:
        return tree
    structure = jax.tree.structure(mask)
    # A module is a tree that may also be callable; a function is a leaf.
    if callable(mask) and (structure.num_nodes == 1 or structure != jax.tree.structure(tree)):
        if params is None:
            raise ValueError(
                "exp_avg_mask is a function of the parameters, so the update needs them: optimizer.update(gradients, state, params)"
            )
        mask = mask(params)
    return jax.tree.map(lambda x, m: x * jnp.broadcast_to(m, x.shape).astype(x.dtype), tree, mask)
