"""LAMB with the coefficients that 1-bit LAMB has, to compare it with: bounded, and without bias correction."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from effscale.optim import gradients as g_
from effscale.optim.freezing import check_moments
from effscale.optim.layerwise import Stacked, TrustRatio, stacked_dims
from effscale.training.schedules import scale_by_learning_rate


class LambState(NamedTuple):
    """State of `scale_by_lamb`: momentum and variance in at least float32."""

    mu: Any
    nu: Any


class Lamb(NamedTuple):
    """The options of LAMB's mathematics, which the warm-up of 1-bit LAMB shares."""

    b1: Any
    b2: Any
    eps: Any
    weight_decay: Any
    mask: Any
    trust: TrustRatio

    def check(self) -> None:
        """Raise a ``ValueError`` for options out of range."""
        check_moments(self.b1, self.b2, self.eps)
        self.trust.check()

    def direction(self, mu: Any, nu: Any, params: Any) -> tuple[Any, Any]:
        """Momentum by the root of the variance, without and with weight decay."""
        u = jax.tree.map(lambda m, v: g_.normalised(m, v, self.eps), mu, nu)
        decay = optax.add_decayed_weights(self.weight_decay, self.mask)
        return u, decay.update(u, decay.init(params), g_.in_float32(params))[0]

    def step(self, mean: Any, mu: Any, nu: Any, params: Any, dims: Any) -> "LambStep":
        """From the mean gradient, the last moments, the parameters and how many dimensions stack layers."""
        mu, nu = g_.averaged_moments(mean, mu, nu, self.b1, self.b2)
        _, u = self.direction(mu, nu, params)
        coeff = jax.tree.map(self.trust, params, u, dims)
        defined = jax.tree.map(self.trust.defined, params, u, dims)
        return LambStep(mu, nu, coeff, defined, jax.tree.map(jnp.multiply, coeff, u))


class LambStep(NamedTuple):
    """What `Lamb.step` finds: the moments; each layer's coefficient, and whether it is the quotient of two norms; the update."""

    mu: Any
    nu: Any
    coeff: Any
    defined: Any
    update: Any


def scale_by_lamb(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    *,
    max_coeff: ArrayLike = 10.0,
    min_coeff: ArrayLike = 0.01,
    stacked: Stacked = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scale by LAMB, weight decay included.

    .. math:: u = m / (\sqrt v + \epsilon) + \lambda p, \qquad
        c = \mathrm{clip}(\lVert p \rVert / \lVert u \rVert, c_{\min}, c_{\max}), \qquad \text{update} = c \, u

    with one coefficient for each layer, and c = 1 where either norm is zero. Unlike ``optax.lamb``: no bias correction, and a
    bounded coefficient.

    Args:
        b1: Decay of the momentum.
        b2: Decay of the variance.
        eps: Added to the root of the variance.
        weight_decay: :math:`\lambda`; it counts in the norm of the update.
        mask: Which parameters decay.
        max_coeff: Greatest coefficient.
        min_coeff: Least coefficient.
        stacked: Leading dimensions that stack layers, each of which has a coefficient; see `Stacked`.

    Returns:
        An optax transformation, whose update needs the parameters.

    References:
        You et al., `Large Batch Optimization for Deep Learning <https://arxiv.org/abs/1904.00962>`_, 2020
    """
    lamb = Lamb(b1, b2, eps, weight_decay, mask, TrustRatio(max_coeff, min_coeff))
    lamb.check()

    def init(params: Any) -> Any:
        return LambState(g_.moments_like(params), g_.moments_like(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del extra
        if params is None:
            raise ValueError(
                "LAMB needs the parameters: optimizer.update(gradients, state, params)"
            )
        dims = stacked_dims(params, stacked)
        step = lamb.step(g_.in_float32(updates), state.mu, state.nu, params, dims)
        return g_.in_types_of(updates, step.update), LambState(step.mu, step.nu)

    return optax.GradientTransformationExtraArgs(init, update)


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
) -> optax.GradientTransformationExtraArgs:
    """LAMB with bounded coefficients; `scale_by_lamb` has the mathematics and the options.

    Args:
        learning_rate: A number or a schedule.
        b1: Decay of the momentum.
        b2: Decay of the variance.
        eps: Added to the root of the variance.
        weight_decay: Weight decay, within the coefficient's norm.
        mask: Which parameters decay.
        max_coeff: Greatest coefficient.
        min_coeff: Least coefficient.
        stacked: Leading dimensions that stack layers.

    Example:
        >>> optimizer = lamb(0.1)
        >>> params = jnp.array([3.0, -4.0])
        >>> updates, _ = optimizer.update(jnp.array([1.0, 1.0]), optimizer.init(params), params)
        >>> [round(float(u), 4) for u in updates]  # a tenth of the parameters' length, whatever the gradient's
        [-0.3536, -0.3536]
    """
    return optax.chain(
        scale_by_lamb(
            b1,
            b2,
            eps,
            weight_decay,
            mask,
            max_coeff=max_coeff,
            min_coeff=min_coeff,
            stacked=stacked,
        ),
        scale_by_learning_rate(learning_rate),
    )
