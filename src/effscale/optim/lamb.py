"""LAMB with the coefficients of 1-bit LAMB (bounded, without bias correction), as a baseline for it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from effscale.optim.moments import (
    averaged_moments,
    check_bounds,
    check_moments,
    in_float32,
    in_types_of,
    moments_like,
    normalized,
)
from effscale.training.partition import NamedLeaf, named_leaves
from effscale.training.schedules import scale_by_learning_rate

Stacked = Any
"""The number of leading dimensions of each array that stack separate tensors: a tree of integers like the parameters,
or one integer for all. None counts the dimensions that the logical axes of an ``nnx.Variable`` do not name, and the
leading ones named ``layers`` and ``experts``; it is zero for any other array."""


class LambState(NamedTuple):
    """The state of `lamb`: momentum and variance, the latter in at least float32."""

    mu: Any
    nu: Any


def lamb(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    *,
    max_coeff: ArrayLike = 10.0,
    min_coeff: ArrayLike = 0.01,
    stacked: Stacked = None,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Create LAMB with bounded coefficients.

    $$u = m / (\sqrt v + \epsilon) + \lambda p, \qquad
        c = \mathrm{clip}(\lVert p \rVert / \lVert u \rVert, c_{\min}, c_{\max}), \qquad p \leftarrow p - \gamma c \, u$$

    with one coefficient for each layer, and c = 1 where either norm is zero. Unlike ``optax.lamb``, it has no bias correction and
    bounds the coefficient. Without weight decay and within the bounds, the correction would change nothing: it multiplies
    $u$ by one number, and c divides by it. LAMB cannot be split into a ``scale_by_lamb`` and a separate weight decay,
    because the norm of $u$ includes the weight decay.

    Args:
        learning_rate: A number or a schedule.
        b1: The decay rate of the momentum.
        b2: The decay rate of the variance.
        eps: Number added to the root of the variance.
        weight_decay: $\lambda$; the norm of the update includes it.
        mask: The parameters that decay.
        max_coeff: The upper bound of the coefficient.
        min_coeff: The lower bound of the coefficient.
        stacked: The number of leading dimensions that stack layers, each of which has a coefficient; see `Stacked`.
        mu_dtype: The type in which the momentum is stored; None means at least float32.

    Returns:
        An optax transformation, whose update needs the parameters.

    Example:
        >>> optimizer = lamb(0.1)
        >>> params = jnp.array([3.0, -4.0])
        >>> updates, _ = optimizer.update(jnp.array([1.0, 1.0]), optimizer.init(params), params)
        >>> [round(float(u), 4) for u in updates]  # a tenth of the parameters' norm, for any gradient
        [-0.3536, -0.3536]

    References:
        You et al., "Large Batch Optimization for Deep Learning" (2020), ICLR. https://arxiv.org/abs/1904.00962
    """
    rule = Lamb(b1, b2, eps, weight_decay, mask, max_coeff, min_coeff)
    rule.check(mu_dtype)

    def init(params: Any) -> Any:
        return LambState(moments_like(params, mu_dtype), moments_like(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del extra
        check_params(params)
        dims = stacked_dims(params, stacked)
        mu = in_types_of(state.nu, state.mu)
        step = rule.step(in_float32(updates), mu, state.nu, params, dims)
        new = LambState(in_types_of(state.mu, step.mu), step.nu)
        return in_types_of(updates, step.update), new

    core = optax.GradientTransformationExtraArgs(init, update)
    return optax.chain(core, scale_by_learning_rate(learning_rate))


class Lamb(NamedTuple):
    """The options of the LAMB update, which the warmup of 1-bit LAMB shares."""

    b1: Any
    b2: Any
    eps: Any
    weight_decay: Any
    mask: Any
    max_coeff: Any
    min_coeff: Any

    def check(self, mu_dtype: DTypeLike | None) -> None:
        """Raise a ``ValueError`` for options out of range."""
        check_moments(self.b1, self.b2, self.eps, mu_dtype)
        low, high = ("min_coeff", self.min_coeff), ("max_coeff", self.max_coeff)
        check_bounds(low, high, "be ordered and not negative")

    def direction(self, mu: Any, nu: Any, params: Any) -> tuple[Any, Any]:
        """Return the momentum divided by the root of the variance, without and with weight decay."""
        u = jax.tree.map(lambda m, v: normalized(m, v, self.eps), mu, nu)
        decay = optax.add_decayed_weights(self.weight_decay, self.mask)
        return u, decay.update(u, decay.init(params), in_float32(params))[0]

    def coefficient(self, p: jax.Array, u: jax.Array, d: int) -> jax.Array:
        """Return the norm of the parameters divided by that of the update, clipped to the bounds; one where it is not `_defined`."""
        norm_p, norm_u = norms(p, d), norms(u, d)
        ratio = jnp.clip(
            norm_p / jnp.where(norm_u > 0, norm_u, 1.0), self.min_coeff, self.max_coeff
        )
        return jnp.where(_defined(p, u, d), ratio, 1.0)

    def step(self, mean: Any, mu: Any, nu: Any, params: Any, dims: Any) -> "LambStep":
        """Compute a step from the mean gradient, the last moments, the parameters and the number of dimensions that stack layers."""
        mu, nu = averaged_moments(mean, mu, nu, self.b1, self.b2)
        _, u = self.direction(mu, nu, params)
        coeff = jax.tree.map(self.coefficient, params, u, dims)
        defined = jax.tree.map(_defined, params, u, dims)
        return LambStep(mu, nu, coeff, defined, jax.tree.map(jnp.multiply, coeff, u))


def _defined(p: jax.Array, u: jax.Array, d: int) -> jax.Array:
    """Return whether neither norm is zero."""
    return (norms(p, d) > 0) & (norms(u, d) > 0)


def check_params(params: Any) -> None:
    """Raise a ``ValueError`` if the parameters are missing."""
    if params is None:
        raise ValueError("LAMB needs the parameters: optimizer.update(gradients, state, params)")


class LambStep(NamedTuple):
    """The result of `Lamb.step`: the moments; each layer's coefficient, and whether it is the ratio of two norms; the update."""

    mu: Any
    nu: Any
    coeff: Any
    defined: Any
    update: Any


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
