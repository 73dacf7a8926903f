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
    """State of `scale_by_lamb`: updates made (int32), momentum and variance in at least float32."""

    count: Any
    mu: Any
    nu: Any


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
    check_moments(b1, b2, eps)
    ratio = TrustRatio(max_coeff, min_coeff)
    ratio.check()
    decay = optax.add_decayed_weights(weight_decay, mask)

    def init(params: Any) -> Any:
        return LambState(jnp.zeros((), jnp.int32), g_.moments_like(params), g_.moments_like(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del extra
        if params is None:
            raise ValueError(
                "LAMB needs the parameters: optimizer.update(gradients, state, params)"
            )
        mu, nu = g_.averaged_moments(g_.in_float32(updates), state.mu, state.nu, b1, b2)
        u = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
        u, _ = decay.update(u, decay.init(params), g_.in_float32(params))
        scaled = jax.tree.map(
            lambda p, x, dims, g: (ratio(p, x, dims) * x).astype(g.dtype),
            params,
            u,
            stacked_dims(params, stacked),
            updates,
        )
        return scaled, LambState(optax.safe_increment(state.count), mu, nu)

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
