"""Momentum and variance: their types, their updates, and checks of the options that decide them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from effscale.optim.tensor_layout import check_real


def moments_like(params: Any, dtype: DTypeLike | None = None) -> Any:
    """Return zeros in a given type, or in at least float32.

    In a narrower type, second moments that decay by 0.999 would not change.
    """
    check_real(params)
    type_of = lambda p: _at_least_float32(p.dtype) if dtype is None else dtype
    return jax.tree.map(lambda p: jnp.zeros_like(p, type_of(p)), params)


def averaged_moments(mean: Any, mu: Any, nu: Any, b1: Any, b2: Any) -> tuple[Any, Any]:
    """Return momentum and variance after a step of the warmup, from the mean gradient in at least float32."""
    return lerp(mu, mean, b1), lerp(nu, jax.tree.map(jnp.square, mean), b2)


def lerp(old: Any, new: Any, decay: Any) -> Any:
    """Return ``decay * old + (1 - decay) * new`` in the type of ``old``."""
    mixed = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b.astype(a.dtype), old, new)
    return in_types_of(old, mixed)  # an injected decay is an array, with a type of its own


def bias_correction(decay: Any, count: jax.Array) -> jax.Array:
    """Return ``1 - decay**count``, the divisor that corrects an average that started at zero after ``count`` updates, as in Adam."""
    return 1 - decay ** count.astype(jnp.float32)


def corrected(moments: Any, correction: Any) -> Any:
    """Return the moments divided by their `bias_correction`."""
    return jax.tree.map(lambda m: m / correction.astype(m.dtype), moments)


def normalized(mu: Any, nu: Any, eps: Any) -> Any:
    """Return the momentum divided by the root of the variance. Zero divided by zero is zero, also without epsilon, as there was no gradient."""
    return mu / jnp.where(nu > 0, jnp.sqrt(nu) + eps, 1.0)


def where_known(mu: Any, nu: Any) -> Any:
    """Return the momentum, and zero where the variance is zero.

    One bit cannot represent zero. A parameter without a gradient would receive plus or minus the scale, divided only by epsilon.
    """
    return jax.tree.map(lambda m, v: jnp.where(v > 0, m, jnp.zeros_like(m)), mu, nu)


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


def in_float32(tree: Any) -> Any:
    """Return the tree in at least float32."""
    return jax.tree.map(lambda x: x.astype(_at_least_float32(x.dtype)), tree)


def in_types_of(like: Any, tree: Any) -> Any:
    """Return the tree in the types of another."""
    return jax.tree.map(lambda a, x: x.astype(a.dtype), like, tree)


def _at_least_float32(dtype: Any) -> Any:
    return jnp.float32 if jnp.dtype(dtype).itemsize < 4 else dtype


def decayed_weights(weight_decay: Any, mask: Any) -> optax.GradientTransformation:
    """Return ``optax.add_decayed_weights``, or a transformation that does not need the parameters if the decay is known to be zero."""
    if is_zero(weight_decay):
        return optax.identity()
    return optax.add_decayed_weights(weight_decay, mask)


def is_zero(weight_decay: Any) -> bool:
    """Return whether a weight decay is known to be zero; an injected one never is."""
    return isinstance(weight_decay, int | float) and weight_decay == 0


def unlike_params(params: Any, make: Callable[[], Any]) -> Any:
    """Create a part of a state that is a tree like the parameters, but with arrays of other shapes.

    `optax.tree.map_params` initializes the state again with a placeholder that contains no arrays. Where the placeholder
    is returned, it maps over a copy of the parameters; where a single array is returned, the whole part is passed to
    ``transform_non_params``. So without parameters this part is an empty array.

    Args:
        params: The parameters.
        make: Creates the part.

    Example:
        >>> unlike_params({"w": jnp.ones(3)}, lambda: {"w": jnp.zeros(1)})["w"].shape, unlike_params((), tuple).shape
        ((1,), (0,))
    """
    return make() if jax.tree.leaves(params) else jnp.zeros((0,), jnp.float32)


def _known(value: Any) -> float | None:
    """Return the value of an option as a number; None if it is None, or traced because `optax.inject_hyperparams` passed it."""
    return None if value is None or isinstance(value, jax.core.Tracer) else float(value)


def check_number(name: str, value: Any, holds: Callable[[float], bool], wanted: str) -> None:
    """Raise a ``ValueError`` that names the option and its value unless ``holds``, if the value is known.

    >>> check_number("b1", 1.5, lambda b: 0 <= b < 1, "be in [0, 1)")
    Traceback (most recent call last):
    ValueError: b1 must be in [0, 1), got 1.5
    """
    number = _known(value)
    if number is not None and not holds(number):
        raise ValueError(f"{name} must {wanted}, got {value}")


def check_count(name: str, value: Any, least: int, why: str = "") -> None:
    """Raise a ``ValueError`` unless the value is a whole number of at least ``least``, if it is known.

    >>> check_count("freeze_step", 0, 1)
    Traceback (most recent call last):
    ValueError: freeze_step must be a whole number of at least 1, got 0
    """
    wanted = f"be a whole number of at least {least}{why}"
    check_number(name, value, lambda x: x >= least and x % 1 == 0, wanted)


def check_bounds(low: tuple[str, Any], high: tuple[str, Any], wanted: str) -> None:
    """Raise a ``ValueError`` unless ``0 <= low <= high``, each a name and a value, if they are known.

    >>> check_bounds(("min_coeff", 2.0), ("max_coeff", 1.0), "be ordered and not negative")
    Traceback (most recent call last):
    ValueError: min_coeff and max_coeff must be ordered and not negative, got 2.0 and 1.0
    """
    smaller, larger = _known(low[1]), _known(high[1])
    if smaller is not None and larger is not None and not 0 <= smaller <= larger:
        raise ValueError(f"{low[0]} and {high[0]} must {wanted}, got {low[1]} and {high[1]}")


def check_moments(b1: Any, b2: Any, eps: Any, mu_dtype: DTypeLike | None = None) -> None:
    """Raise a ``ValueError`` for decays or an epsilon out of range, or a type that cannot store a momentum."""
    for name, value in (("b1", b1), ("b2", b2)):
        check_number(name, value, lambda b: 0 <= b < 1, "be in [0, 1)")
    check_number("eps", eps, lambda e: e >= 0, "not be negative")
    if mu_dtype is not None and not jnp.issubdtype(mu_dtype, jnp.floating):
        raise ValueError(f"mu_dtype must be a floating-point type, or None, got {mu_dtype!r}")
