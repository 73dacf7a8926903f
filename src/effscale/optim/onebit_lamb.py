"""1-bit LAMB: LAMB's coefficients are learned in a warmup, then adapted while momentum is exchanged in one bit per number."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from effscale.optim import averaging
from effscale.optim.freezing import (
    RatioState,
    VarianceRatio,
    check_freeze_step,
    init_ratio,
    is_frozen,
    watch_variance,
)
from effscale.optim.lamb import Lamb, Stacked, check_params, layer_shape, norms, stacked_dims
from effscale.optim.moments import (
    check_bounds,
    check_number,
    in_types_of,
    lerp,
    masked,
    moments_like,
    unlike_params,
    where_known,
)
from effscale.optim.workers import (
    Workers,
    agree,
    axis_of,
    bytes_sent,
    check_local,
    clipped_locally,
    clipped_mean,
    init_errors,
    refusing_left_out_workers,
    with_scales,
)
from effscale.parallel.workers import PerWorker, SendsBytes
from effscale.training.clipping import Clip, check_clip
from effscale.training.schedules import scale_by_learning_rate


@SendsBytes.register
class OneBitLambState(NamedTuple):
    """The state of `onebit_lamb`. Arrays with one number per layer broadcast against the parameters.

    Attributes:
        count: The number of updates, int32.
        mu: The momentum, the same on all workers, in ``mu_dtype``.
        nu: The variance of the warmup.
        nu_fresh: The variance after the warmup, of the gradients reconstructed from the exchanged momentum.
        frozen_coeff: LAMB's coefficient of each layer, averaged over the warmup; 0 if it had none yet.
        last_factor: The last factor of each layer's coefficient.
        scaling_coeff: The factor of each layer's momentum that equalizes all layers for the exchange.
        compressing: Whether a compressed step was made.
        ratio: The state of `VarianceRatio`.
        errors: Each worker's `ErrorFeedback`, of the scaled momenta.
        sent: The bytes that each worker's device sent in the last update, by formula, float32.
    """

    count: Any
    mu: Any
    nu: Any
    nu_fresh: Any
    frozen_coeff: Any
    last_factor: Any
    scaling_coeff: Any
    compressing: jax.Array
    ratio: RatioState | None
    errors: PerWorker | None
    sent: Any


def onebit_lamb(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    *,
    freeze_step: ArrayLike = 100_000,
    max_coeff: ArrayLike = 10.0,
    min_coeff: ArrayLike = 0.01,
    coeff_beta: ArrayLike = 0.9,
    factor_max: ArrayLike = 4.0,
    factor_min: ArrayLike = 0.5,
    factor_threshold: ArrayLike = 0.1,
    variance_ratio: VarianceRatio | None = None,
    mu_dtype: DTypeLike | None = None,
    exp_avg_mask: Any = None,
    clip: Clip | None = None,
    stacked: Stacked = None,
    workers: Workers | None = None,
    skip_nonfinite: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Create 1-bit LAMB.

    The warmup is ``effscale.optim.lamb`` on the mean gradient. It also keeps a moving average of each layer's coefficient:
    $\bar c \leftarrow \beta_c \bar c + (1 - \beta_c) c$. Steps in which a norm is zero do not count, and $\bar c$ is 1 for a
    layer without any step that counts.

    After the warmup, the momentum of each layer is multiplied by $a = \bar z / z$ for the exchange. z is the root mean square
    of the layer's momentum at the end of the warmup, and $\bar z$ is its mean over layers:

    $$
    \begin{aligned}
    m' &= \mathrm{mean}_{1 \mathrm{bit}}\bigl(a (\beta_1 m + (1 - \beta_1) g_r)\bigr) / a \\
    \hat g &= (m' - \beta_1 m) / (1 - \beta_1), \qquad \hat v \leftarrow \beta_2 \hat v + (1 - \beta_2) \hat g^2 \\
    r &= \max_{v > 0} \frac{\sqrt v + \epsilon}{\sqrt{\hat v} + \epsilon}, \qquad
    u = m' / (\sqrt v + \epsilon) + \lambda p, \qquad p \leftarrow p - \gamma \bar c \, r \, u
    \end{aligned}
    $$

    With weight decay, r becomes $r \rho + 1 - \rho$ with $\rho = \min(1, \lVert u_0 \rVert / \lVert u \rVert)$, where $u_0$
    is the update without weight decay. Then r is clipped to [factor_min, factor_max], and to within ``factor_threshold`` of
    its last value. The product of coefficient and factor is not clipped. Moments are not corrected for bias, because a
    coefficient within its bounds would cancel the correction (see ``effscale.optim.lamb``). 1-bit LAMB cannot be split into a
    ``scale_by_onebit_lamb`` and a separate weight decay, because coefficient and factor depend on the weight decay.

    Args:
        learning_rate: A number or a schedule.
        b1: The decay rate of the momentum.
        b2: The decay rate of the variances.
        eps: Number added to the roots of the variances.
        weight_decay: $\lambda$.
        mask: The parameters that decay.
        freeze_step: The number of warmup updates.
        max_coeff: The upper bound of the coefficient in the warmup.
        min_coeff: The lower bound of the coefficient in the warmup.
        coeff_beta: $\beta_c$; the warmup should have more than 1 / (1 - coeff_beta) steps.
        factor_max: The upper bound of the factor, which depends on the one element of a layer whose fresh variance decreased most, so with a
            ``b2`` well below 0.999 it keeps growing; use 1 in this case.
        factor_min: The lower bound of the factor.
        factor_threshold: The maximum relative change of the factor in a step.
        variance_ratio: Ends the warmup earlier, once the variance has settled.
        mu_dtype: As in ``effscale.optim.scale_by_onebit_adam``.
        exp_avg_mask: As in ``effscale.optim.scale_by_onebit_adam``.
        clip: The maximum norm of the gradient, such as ``effscale.training.Clip(1.0)``; None disables clipping.
        stacked: The number of leading dimensions that stack layers; see `Stacked`.
        workers: The workers to average over, such as ``Workers("data")``, by default with one scale for the whole tree, as in the
            paper. None trains on one worker; in a step of ``effscale.parallel.per_worker`` it raises an error.
        skip_nonfinite: Whether all workers skip a step in which any worker has a gradient that is not finite; see
            ``effscale.optim.skip_nonfinite``.

    Returns:
        An optax transformation, whose update needs the parameters.

    Raises:
        ValueError: As for ``effscale.optim.scale_by_onebit_adam``.

    Example:
        >>> optimizer = onebit_lamb(0.02, freeze_step=20)
        >>> params = jnp.array([1.0, -2.0])
        >>> @jax.jit
        ... def step(params, state):
        ...     gradients = jax.grad(lambda p: (p**2).sum())(params)
        ...     updates, state = optimizer.update(gradients, state, params)
        ...     return optax.apply_updates(params, updates), state
        >>> state = optimizer.init(params)
        >>> for _ in range(60):
        ...     params, state = step(params, state)
        >>> bool(abs(params).max() < 1.8)
        True

    References:
        Li et al., "1-bit LAMB" (2021). https://arxiv.org/abs/2104.06069
    """
    workers = with_scales(workers, "tree")
    axis_name = axis_of(workers)
    lamb = Lamb(b1, b2, eps, weight_decay, mask, max_coeff, min_coeff)
    rule = _OneBitLamb(
        lamb,
        coeff_beta,
        factor_max,
        factor_min,
        factor_threshold,
        variance_ratio,
        exp_avg_mask,
        clip,
        workers,
    )
    lamb.check(mu_dtype)
    rule.check()
    check_freeze_step(freeze_step)
    check_clip(clip)

    def init(params: Any) -> Any:
        dims = stacked_dims(params, stacked)

        def each(value: float) -> Any:
            full = lambda p, d: jnp.full(layer_shape(p, d), value, jnp.float32)
            return unlike_params(params, lambda: jax.tree.map(full, params, dims))

        return OneBitLambState(
            count=jnp.zeros((), jnp.int32),
            mu=moments_like(params, mu_dtype),
            nu=moments_like(params),
            nu_fresh=moments_like(params),
            frozen_coeff=each(0.0),
            last_factor=each(1.0),
            scaling_coeff=each(1.0),
            compressing=jnp.zeros((), jnp.bool_),
            ratio=init_ratio(variance_ratio),
            errors=init_errors(params, workers),
            sent=jnp.zeros((), jnp.float32),
        )

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del extra
        check_params(params)
        if not jax.tree.leaves(updates):
            return updates, state
        check_local(updates, axis_name)
        dims = stacked_dims(params, stacked)
        frozen = is_frozen(freeze_step, state.ratio, state.count)
        out, new = jax.lax.cond(
            frozen,
            lambda: _compressed(rule, updates, state, params, dims),
            lambda: _warm_up(rule, updates, state, params, dims),
        )
        full, one_bit = bytes_sent(updates, workers)
        return out, new._replace(
            count=optax.safe_increment(state.count), sent=jnp.where(frozen, one_bit, full)
        )

    core = optax.GradientTransformationExtraArgs(init, update)
    optimizer = optax.chain(core, scale_by_learning_rate(learning_rate))
    if skip_nonfinite:
        optimizer = averaging.skip_nonfinite(optimizer, axis_name)
    return refusing_left_out_workers(optimizer, workers)


class _OneBitLamb(NamedTuple):
    """The options of both stages."""

    lamb: Lamb
    coeff_beta: Any
    factor_max: Any
    factor_min: Any
    factor_threshold: Any
    variance_ratio: VarianceRatio | None
    exp_avg_mask: Any
    clip: Clip | None
    workers: Workers | None

    def check(self) -> None:
        """Raise a ``ValueError`` for options out of range."""
        check_number("coeff_beta", self.coeff_beta, lambda x: 0 <= x < 1, "be in [0, 1)")
        check_number("factor_min", self.factor_min, lambda x: x > 0, "be positive")
        low, high = ("factor_min", self.factor_min), ("factor_max", self.factor_max)
        check_bounds(low, high, "be in increasing order")
        check_number(
            "factor_threshold", self.factor_threshold, lambda x: 0 <= x < 1, "be in [0, 1)"
        )


def _warm_up(
    o: _OneBitLamb, gradients: Any, state: OneBitLambState, params: Any, dims: Any
) -> tuple[Any, OneBitLambState]:
    r"""Make a step of LAMB on the mean gradient, and $\bar c \leftarrow \beta_c \bar c + (1 - \beta_c) c$."""
    g = clipped_mean(gradients, axis_of(o.workers), o.clip)
    step = o.lamb.step(g, in_types_of(state.nu, state.mu), state.nu, params, dims)
    frozen_coeff = jax.tree.map(
        lambda old, c, defined: jnp.where(defined, lerp(old, c, o.coeff_beta), old),
        state.frozen_coeff,
        step.coeff,
        step.defined,
    )
    new = state._replace(
        mu=in_types_of(state.mu, step.mu),
        nu=step.nu,
        frozen_coeff=frozen_coeff,
        # Reset the factors of earlier compressed steps, if freeze_step was increased since.
        last_factor=jax.tree.map(jnp.ones_like, state.last_factor),
        compressing=jnp.zeros((), jnp.bool_),
        ratio=watch_variance(o.variance_ratio, state.ratio, state.count, step.nu),
    )
    return in_types_of(gradients, step.update), new


def _compressed(
    o: _OneBitLamb, gradients: Any, state: OneBitLambState, params: Any, dims: Any
) -> tuple[Any, OneBitLambState]:
    """Make a step after the warmup: the mean momentum in one bit, the fresh variance, and the factors that it gives the coefficients."""
    v, last_m = state.nu, in_types_of(state.nu, state.mu)
    g_r = clipped_locally(gradients, axis_of(o.workers), o.clip)
    a = jax.lax.cond(
        state.compressing, lambda: state.scaling_coeff, lambda: _scaling_coeff(last_m, dims)
    )
    m_r = where_known(lerp(last_m, g_r, o.lamb.b1), v)
    # Errors of compressed steps before a second warmup belong to momenta with a different scaling.
    errors = jax.tree.map(
        lambda e: jnp.where(state.compressing, e, jnp.zeros_like(e)), state.errors
    )
    m, errors = agree(jax.tree.map(jnp.multiply, m_r, a), errors, o.workers)
    # Parameters that never had a gradient or are masked do not move and do not affect the factor.
    known = jax.tree.map(lambda v: (v > 0).astype(v.dtype), v)
    moves = masked(known, o.exp_avg_mask, params)
    m = jax.tree.map(lambda m, a, k: m / a * k, m, a, moves)

    # The fresh variance continues from that of the warmup.
    start = jax.tree.map(lambda v, v_hat: jnp.where(state.compressing, v_hat, v), v, state.nu_fresh)
    v_hat = jax.tree.map(
        lambda v_hat, m, last_m: _fresh_variance(o.lamb, v_hat, m, last_m), start, m, last_m
    )
    u0, u = o.lamb.direction(m, v, params)
    factor = lambda *arrays: _factor(o, *arrays)
    r = jax.tree.map(factor, v, v_hat, moves, u0, u, state.last_factor, dims)
    c = jax.tree.map(lambda c: jnp.where(c > 0, c, 1.0), state.frozen_coeff)
    out = jax.tree.map(lambda c, r, u: c * r * u, c, r, u)
    new = state._replace(
        mu=in_types_of(state.mu, m),
        nu_fresh=v_hat,
        last_factor=r,
        scaling_coeff=a,
        compressing=jnp.ones((), jnp.bool_),
        errors=errors,
    )
    return in_types_of(gradients, out), new


def _fresh_variance(lamb: Lamb, v_hat: Any, m: Any, last_m: Any) -> Any:
    r"""$\beta_2 \hat v + (1 - \beta_2) \hat g^2$ of the gradient $\hat g$ that leads from the last momentum to this one."""
    g_hat = (m - lamb.b1 * last_m) / (1 - lamb.b1)
    return lamb.b2 * v_hat + (1 - lamb.b2) * jnp.square(g_hat)


def _factor(
    o: _OneBitLamb, v: Any, v_hat: Any, moves: Any, u0: Any, u: Any, last: Any, d: int
) -> Any:
    """Return the factor r of a layer, within its bounds and near its last value."""
    r = _greatest_quotient(v, v_hat, moves, o.lamb.eps, d)
    r = jnp.where(jnp.asarray(o.lamb.weight_decay) > 0, _share_of_update(r, u0, u, d), r)
    r = jnp.clip(r, o.factor_min, o.factor_max)
    r = jnp.clip(r, last * (1.0 - o.factor_threshold), last * (1.0 + o.factor_threshold))
    return r.astype(last.dtype)


def _greatest_quotient(v: Any, v_hat: Any, moves: Any, eps: Any, d: int) -> Any:
    r"""$r = \max (\sqrt v + \epsilon) / (\sqrt{\hat v} + \epsilon)$ of a layer, over what moves; 1 where nothing does.

    The first ``d`` dimensions stack layers.
    """
    root, root_hat = (jnp.where(moves != 0, jnp.sqrt(x) + eps, 1.0) for x in (v, v_hat))
    quotient = jnp.where(moves != 0, root / root_hat, 0.0)
    r = jnp.max(quotient, axis=tuple(range(d, v.ndim)), keepdims=True, initial=0.0)
    return jnp.where(r > 0, r, 1.0)


def _share_of_update(r: Any, u0: Any, u: Any, d: int) -> Any:
    r"""$r \rho + 1 - \rho$, with $\rho$ the share of the update without weight decay, u0, in the one with it, u."""
    with_decay = norms(u, d)
    rho = jnp.minimum(1.0, norms(u0, d) / jnp.where(with_decay > 0, with_decay, 1.0))
    return r * rho + (1.0 - rho)


def _scaling_coeff(mu: Any, dims: Any) -> Any:
    """Return the mean over layers of the momentum's root mean square, divided by that of each layer."""

    def root_mean_square(m: Any, d: int) -> Any:
        return norms(m, d) / jnp.sqrt(jnp.float32(max(1, m[(0,) * d].size)))

    z = jax.tree.map(root_mean_square, mu, dims)
    layers = [jnp.ravel(x) for x in jax.tree.leaves(z)]
    mean = jnp.mean(jnp.concatenate(layers)) if layers else jnp.float32(1.0)
    # A layer without momentum needs no scaling, and its root mean square of zero cannot be a divisor.
    return jax.tree.map(lambda x: jnp.where(x > 0, mean / jnp.where(x > 0, x, 1.0), 1.0), z)
