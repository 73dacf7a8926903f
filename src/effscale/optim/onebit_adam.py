"""1-bit Adam: Adam until its variance has settled, then momentum in one bit per number."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from effscale.optim import averaging, moments
from effscale.optim.freezing import (
    RatioState,
    VarianceRatio,
    check_freeze_step,
    init_ratio,
    is_frozen,
    watch_variance,
)
from effscale.optim.moments import (
    averaged_moments,
    check_moments,
    corrected,
    decayed_weights,
    in_types_of,
    lerp,
    masked,
    moments_like,
    normalized,
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
)
from effscale.parallel.workers import PerWorker, SendsBytes
from effscale.training.clipping import Clip, check_clip
from effscale.training.schedules import scale_by_learning_rate


@SendsBytes.register
class OneBitAdamState(NamedTuple):
    """The state of `scale_by_onebit_adam`.

    Attributes:
        count: The number of updates, int32.
        mu: The momentum, the same on all workers, in ``mu_dtype``.
        nu: The variance, the same on all workers, in at least float32; it does not change after the warmup.
        ratio: The state of `VarianceRatio`; None without it.
        errors: Each worker's `ErrorFeedback`; None without an axis.
        sent: The bytes that each worker's device sent in the last update, by formula, float32.
        nu_count: The number of updates of the variance, int32; None without ``bias_correction``.
    """

    count: Any
    mu: Any
    nu: Any
    ratio: RatioState | None
    errors: PerWorker | None
    sent: Any
    nu_count: Any = None


def scale_by_onebit_adam(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    freeze_step: ArrayLike = 100_000,
    variance_ratio: VarianceRatio | None = None,
    bias_correction: bool = False,
    mu_dtype: DTypeLike | None = None,
    exp_avg_mask: Any = None,
    clip: Clip | None = None,
    workers: Workers | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scale updates by 1-bit Adam.

    Warmup, with $g$ the mean over workers:

    $$m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        u = m / (\sqrt v + \epsilon)$$

    After the warmup, v is frozen, and the workers exchange the mean of their momenta in one bit per number:

    $$m \leftarrow \mathrm{mean}_{1 \mathrm{bit}}\bigl(\beta_1 m + (1 - \beta_1) g_r\bigr), \quad
        u = m / (\sqrt v + \epsilon)$$

    With ``bias_correction`` $u = \hat m / (\sqrt{\hat v} + \epsilon)$ with $\hat m = m / (1 - \beta_1^t)$ and
    $\hat v = v / (1 - \beta_2^k)$, where k counts the updates of v: t in the warmup, which is then exactly Adam's, and
    ``freeze_step`` from there on. So the frozen variance keeps the correction of its last update, and the step size
    does not jump when compression begins.

    Args:
        b1: The decay rate of the momentum.
        b2: The decay rate of the variance.
        eps: Number added to the root of the variance.
        freeze_step: The number of warmup updates: 15 to 25% of a long run, more of a short one.
        variance_ratio: Ends the warmup earlier, once the variance has settled.
        bias_correction: Whether to correct the moments for their start at zero. DeepSpeed has an option of this name,
            which has no effect, so the default is False.
        mu_dtype: The type in which the momentum is stored, e.g. ``"bfloat16"``; it is computed and exchanged in at least float32.
            None means at least float32.
        exp_avg_mask: A mask of zeros and ones that multiplies the momentum after each exchange: a tree like the
            parameters of arrays that broadcast against them, or a function from parameters to such a tree. Use zeros
            where the gradient is always zero after the warmup, as one bit cannot represent zero. (Where the gradient was
            zero in the warmup too, for instance for positions that no row reaches, the variance is zero, and the
            momentum is set to zero without a mask.)
        clip: The maximum norm of the gradient, such as ``effscale.training.Clip(1.0)``; None disables clipping.
        workers: The workers to average over, such as ``Workers("data")``. None trains on one worker, with the same two stages but
            no communication or compression.

    Returns:
        An optax transformation. Call its ``init`` within ``jax.set_mesh(mesh)``, outside the step.

    Raises:
        ValueError: An option is out of range, the axis does not exist, or the gradients in the update are already
            summed over workers.

    References:
        Tang et al., "1-bit Adam" (2021). https://arxiv.org/abs/2102.02888
    """
    check_moments(b1, b2, eps, mu_dtype)
    check_freeze_step(freeze_step)
    check_clip(clip)
    rule = _OneBitAdam(b1, b2, variance_ratio, exp_avg_mask, clip, workers)
    axis_name = axis_of(workers)

    def init(params: Any) -> Any:
        return OneBitAdamState(
            count=jnp.zeros((), jnp.int32),
            mu=moments_like(params, mu_dtype),
            nu=moments_like(params),
            ratio=init_ratio(variance_ratio),
            errors=init_errors(params, workers),
            sent=jnp.zeros((), jnp.float32),
            nu_count=jnp.zeros((), jnp.int32) if bias_correction else None,
        )

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del extra
        if not jax.tree.leaves(updates):
            return updates, state
        check_local(updates, axis_name)
        last_mu = in_types_of(state.nu, state.mu)
        frozen = is_frozen(freeze_step, state.ratio, state.count)
        mu, nu, ratio, errors = jax.lax.cond(
            frozen,
            lambda: _compressed(rule, updates, last_mu, state, params),
            lambda: _warm_up(rule, updates, last_mu, state),
        )
        full, one_bit = bytes_sent(updates, workers)
        new = OneBitAdamState(
            count=optax.safe_increment(state.count),
            mu=in_types_of(state.mu, mu),
            nu=nu,
            ratio=ratio,
            errors=errors,
            sent=jnp.where(frozen, one_bit, full),
            nu_count=state.nu_count,
        )
        if bias_correction:
            new = new._replace(nu_count=jnp.where(frozen, state.nu_count, state.nu_count + 1))
            mu = corrected(mu, moments.bias_correction(b1, new.count))
            nu = corrected(nu, moments.bias_correction(b2, new.nu_count))
        scaled = jax.tree.map(lambda m, v: normalized(m, v, eps), mu, nu)
        return in_types_of(updates, scaled), new

    return optax.GradientTransformationExtraArgs(init, update)


class _OneBitAdam(NamedTuple):
    """The options of both stages."""

    b1: Any
    b2: Any
    variance_ratio: VarianceRatio | None
    exp_avg_mask: Any
    clip: Clip | None
    workers: Workers | None


def _warm_up(o: _OneBitAdam, gradients: Any, m: Any, state: OneBitAdamState) -> Any:
    r"""Average the mean gradient: $m \leftarrow \beta_1 m + (1 - \beta_1) g$ and $v \leftarrow \beta_2 v + (1 - \beta_2) g^2$."""
    g = clipped_mean(gradients, axis_of(o.workers), o.clip)
    m, v = averaged_moments(g, m, state.nu, o.b1, o.b2)
    return m, v, watch_variance(o.variance_ratio, state.ratio, state.count, v), state.errors


def _compressed(o: _OneBitAdam, gradients: Any, m: Any, state: OneBitAdamState, params: Any) -> Any:
    r"""Exchange the momentum: $m \leftarrow \mathrm{mean}_{1 \mathrm{bit}}(\beta_1 m + (1 - \beta_1) g_r)$, and $v$ stays."""
    v = state.nu
    g_r = clipped_locally(gradients, axis_of(o.workers), o.clip)
    m_r = where_known(lerp(m, g_r, o.b1), v)
    m, errors = agree(m_r, state.errors, o.workers)
    m = where_known(masked(m, o.exp_avg_mask, params), v)
    return m, v, state.ratio, errors


def onebit_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    *,
    freeze_step: ArrayLike = 100_000,
    variance_ratio: VarianceRatio | None = None,
    bias_correction: bool = False,
    mu_dtype: DTypeLike | None = None,
    exp_avg_mask: Any = None,
    clip: Clip | None = None,
    workers: Workers | None = None,
    skip_nonfinite: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Create 1-bit Adam with decoupled weight decay; see `scale_by_onebit_adam` for the formulas and further options.

    To replace ``optax.adam`` or ``optax.adamw``, pass ``bias_correction=True``. Without it, as in DeepSpeed and the papers'
    runs, the first steps are longer than Adam's, by $(1 - \beta_1^t) / \sqrt{1 - \beta_2^t}$: 3.2 times at the first
    step, 6.6 times at the twelfth, 3.2 times again at the hundredth. A learning rate tuned for Adam may then diverge immediately; let
    it rise from zero over some hundred steps, or use a smaller one.

    Args:
        learning_rate: A number or a schedule (also one by tokens, `effscale.training.Schedule`).
        b1: The decay rate of the momentum.
        b2: The decay rate of the variance.
        eps: Number added to the root of the variance.
        weight_decay: The weight decay: ``weight_decay * params`` is added to the update before the learning rate.
        mask: The parameters that decay, as in ``optax.adamw``.
        freeze_step: The number of warmup updates.
        variance_ratio: Ends the warmup earlier, once the variance has settled.
        bias_correction: Whether to correct the moments for their start at zero, as in Adam.
        mu_dtype: The type in which the momentum is stored; None means at least float32.
        exp_avg_mask: As in `scale_by_onebit_adam`.
        clip: The maximum norm of the gradient, such as ``effscale.training.Clip(1.0)``.
        workers: The workers to average over, such as ``Workers("data")``. None trains on one worker; in a step of
            ``effscale.parallel.per_worker`` it raises an error.
        skip_nonfinite: Whether all workers skip a step in which any worker has a gradient that is not finite, before it
            reaches the error feedback; see ``effscale.optim.skip_nonfinite``.

    Returns:
        An optax transformation. Its update needs the parameters if there is weight decay, or an ``exp_avg_mask`` that is
        a function of them.

    Example:
        >>> optimizer = onebit_adam(0.1, freeze_step=10)
        >>> params = jnp.array([1.0, -2.0])
        >>> @jax.jit
        ... def step(params, state):
        ...     gradients = jax.grad(lambda p: (p**2).sum())(params)
        ...     updates, state = optimizer.update(gradients, state, params)
        ...     return optax.apply_updates(params, updates), state
        >>> state = optimizer.init(params)
        >>> for _ in range(60):
        ...     params, state = step(params, state)
        >>> bool(abs(params).max() < 0.2)
        True

    References:
        Tang et al., "1-bit Adam" (2021). https://arxiv.org/abs/2102.02888
    """
    links = [
        scale_by_onebit_adam(
            b1,
            b2,
            eps,
            freeze_step=freeze_step,
            variance_ratio=variance_ratio,
            bias_correction=bias_correction,
            mu_dtype=mu_dtype,
            exp_avg_mask=exp_avg_mask,
            clip=clip,
            workers=workers,
        ),
        decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    ]
    optimizer = optax.chain(*links)
    if skip_nonfinite:
        optimizer = averaging.skip_nonfinite(optimizer, axis_of(workers))
    return refusing_left_out_workers(optimizer, workers)
