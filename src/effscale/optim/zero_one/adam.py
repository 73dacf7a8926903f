"""0/1 Adam: a variance that is updated less and less often, then steps in which the workers send nothing."""

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from effscale.optim import averaging
from effscale.optim.compressed_mean import init_error_feedback
from effscale.optim.moments import (
    check_count,
    check_moments,
    in_types_of,
    moments_like,
    normalized,
    unlike_params,
)
from effscale.optim.workers import (
    Workers,
    axis_of,
    bytes_sent,
    check_local,
    clipped_locally,
    clipped_mean,
    per_worker_zeros,
    refusing_left_out_workers,
)
from effscale.optim.zero_one.policies import Policies, PoliciesState, Round
from effscale.optim.zero_one.rules import OwnWay, Rules, Step, VarDecay, alone, together
from effscale.parallel.workers import MovesParams, PerWorker, SendsBytes, as_local
from effscale.training.clipping import Clip, check_clip
from effscale.training.schedules import value_at


@SendsBytes.register
@MovesParams.register
class ZeroOneAdamState(NamedTuple):
    """The state of `zero_one_adam`.

    Attributes:
        count: The number of updates, int32.
        mu: The momentum that the workers share, in ``mu_dtype``; during local steps it only decays.
        nu: The variance.
        policy: The counters of both policies.
        rates: The sum of learning rates since the last synchronization, float32.
        own: The local progress of each worker, a `PerWorker` of `OwnWay`. On one worker, an `OwnWay` with only ``moved``.
        eps: The number added to the root of the variance, float32.
        sent: The bytes that each worker's device sent in the last update, by formula, float32.
        nu_count: The number of times the variance has decayed by ``b2``, int32; None without ``bias_correction``.
    """

    count: Any
    mu: Any
    nu: Any
    policy: PoliciesState
    rates: Any
    own: Any
    eps: Any
    sent: Any
    nu_count: Any = None

    def local_params(self, params: Any) -> Any:
        """Return the local parameters of a worker, within ``effscale.parallel.per_worker``."""
        if not isinstance(self.own, PerWorker):
            return params
        moved, shared = self.own.value.moved, as_local(params, self.own.axis_name)
        is_masked = lambda node: isinstance(node, optax.MaskedNode)

        def local(u: Any, p: Any, v: Any) -> Any:
            if is_masked(u):  # belongs to another optimizer, by optax.masked or optax.partition
                return p
            return (p.astype(u.dtype) - normalized(u, v, self.eps)).astype(p.dtype)

        return jax.tree.map(local, moved, shared, self.nu, is_leaf=is_masked)


def zero_one_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    *,
    var_freeze_step: ArrayLike = 100_000,
    var_update_scaler: ArrayLike = 16,
    var_decay: VarDecay = "update",
    local_step_scaler: ArrayLike = 32_678,
    local_step_clipper: ArrayLike = 16,
    bias_correction: bool = False,
    mu_dtype: DTypeLike | None = None,
    exp_avg_mask: Any = None,
    clip: Clip | None = None,
    workers: Workers | None = None,
    skip_nonfinite: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Create 0/1 Adam with decoupled weight decay.

    Up to ``var_freeze_step``, at the steps of the variance policy (`Policies`), gradients are averaged uncompressed and

    $$m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2$$

    At the other steps, gradients are averaged in one bit and v does not change. (This follows DeepSpeed; the paper compresses
    the momentum instead.) After ``var_freeze_step``, v is frozen, and each worker r makes local steps until the
    next step of the second policy:

    $$m_r \leftarrow \beta_1 m_r + (1 - \beta_1) g_r, \quad u_r \leftarrow u_r + \gamma m_r, \quad
        x_r = x - u_r / (\sqrt v + \epsilon)$$

    At that step, the workers exchange $\bar u$, the mean of u in one bit, and set $x \leftarrow x - \bar u / (\sqrt v +
    \epsilon)$, $m \leftarrow \bar u / \sum \gamma$, $u \leftarrow 0$. 0/1 Adam cannot be split into a
    ``scale_by_zero_one_adam`` and a separate learning rate, because the exchanged numbers include the learning rate.

    There is no bias correction by default, so the first steps are several times as long as Adam's. To replace ``optax.adam``,
    pass ``bias_correction=True`` (``effscale.optim.onebit_adam`` has the numbers). Then the moments are corrected
    as in Adam during the first stage. When the variance is frozen, the corrected moments replace the stored ones.

    The parameters x that the optimizer updates are the shared ones: between synchronizations its updates are zero, and
    evaluation and checkpoints see the last synchronized parameters. Take a worker's gradient at
    ``effscale.parallel.worker_params(params, opt_state)``, which is $x_r$. On a single worker, each step
    updates the parameters.

    Args:
        learning_rate: A number or a schedule (also one by tokens).
        b1: The decay rate of the momentum.
        b2: The decay rate of the variance.
        eps: Number added to the root of the variance.
        weight_decay: The decoupled weight decay. With several workers it acts at synchronizations, on the shared parameters, with
            the sum of the learning rates; DeepSpeed mixes it into the momentum.
        mask: The parameters that decay, as in ``optax.adamw``.
        var_freeze_step: The number of updates in the first stage; the paper uses those of the learning-rate warmup. If it
            is larger than the number of updates of the run, there are no local steps.
        var_update_scaler: The number of variance updates after which their interval doubles, the paper's kappa.
        var_decay: Whether b2 applies once per ``update`` of the variance, as in the paper, or once per ``step``. The former
            keeps gradients for 1 / (1 - b2) updates, which become less and less frequent, so early gradients stay for long.
        local_step_scaler: The number of steps after which the interval of local steps doubles; see `halving_steps`.
        local_step_clipper: The longest interval, the paper's H.
        bias_correction: Whether to correct the moments for their start at zero.
        mu_dtype: The type in which the momentum is stored; None means at least float32.
        exp_avg_mask: As in ``effscale.optim.scale_by_onebit_adam``.
        clip: The maximum norm of the gradient, such as ``effscale.training.Clip(1.0)``; None disables clipping.
        workers: The workers to average over, such as ``Workers("data")``. None trains on one worker; in a step of
            ``effscale.parallel.per_worker`` it raises an error.
        skip_nonfinite: Whether all workers skip a step in which any worker has a gradient that is not finite; see
            ``effscale.optim.skip_nonfinite``.

    Returns:
        An optax transformation. Its update needs the parameters if there is weight decay, or an ``exp_avg_mask`` that is
        a function of them.

    Raises:
        ValueError: As for ``effscale.optim.scale_by_onebit_adam``; or the update gets no parameters although there is weight
            decay.

    Example:
        >>> optimizer = zero_one_adam(0.1, var_freeze_step=20, local_step_scaler=10)
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
        Lu et al., "0/1 Adam" (2022). https://arxiv.org/abs/2202.06009
    """
    check_moments(b1, b2, eps, mu_dtype)
    policies = Policies(var_freeze_step, var_update_scaler, local_step_scaler, local_step_clipper)
    policies.check()
    if var_decay not in get_args(VarDecay):
        raise ValueError(
            f"var_decay must be one of {', '.join(get_args(VarDecay))}, got {var_decay!r}"
        )
    check_count(
        "var_freeze_step",
        var_freeze_step,
        1,
        ", as the variance must be learned before it is frozen",
    )

    rules = Rules(b1, b2, eps, weight_decay, mask, var_decay, bias_correction, exp_avg_mask)
    check_clip(clip)
    axis_name = axis_of(workers)

    def init(params: Any) -> Any:
        return ZeroOneAdamState(
            count=jnp.zeros((), jnp.int32),
            mu=moments_like(params, mu_dtype),
            nu=moments_like(params),
            policy=policies.init(),
            rates=jnp.zeros((), jnp.float32),
            own=_init_own(params, mu_dtype, workers),
            eps=jnp.asarray(eps, jnp.float32),
            sent=jnp.zeros((), jnp.float32),
            nu_count=jnp.zeros((), jnp.int32) if bias_correction else None,
        )

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        if not jax.tree.leaves(updates):
            return updates, state
        check_local(updates, axis_name)
        rate = value_at(learning_rate, state.count, extra.get("tokens"))
        kind, policy = policies.step(state.policy, state.count)
        # With a learning rate of zero no worker moved, so the momentum cannot be computed from the sum.
        stuck = (kind == int(Round.SYNC)) & (state.rates + rate <= 0)
        kind = jnp.where(stuck, int(Round.LOCAL), kind)
        nu_count = state.nu_count
        if bias_correction:
            decays = 1 if var_decay == "update" else state.policy.var_age
            nu_count = nu_count + jnp.where(kind == int(Round.VARIANCE), decays, 0)
        step = Step(
            kind=kind,
            before=state.policy,
            rate=rate,
            rates_before=state.rates,
            count=optax.safe_increment(state.count),
            nu_count=nu_count,
        )
        # In the first stage only the update is corrected; at its end the moments themselves are corrected permanently.
        mu = in_types_of(state.nu, state.mu)
        mu, nu = rules.unbiased(step.ends_first_stage, mu, state.nu, state.count, state.nu_count)
        g = clipped_locally(in_types_of(state.nu, updates), axis_name, clip)
        if workers is None:
            new = alone(rules, step, mu, nu, g, state.own, params)
        else:
            mean_in_full = lambda: clipped_mean(updates, axis_name, clip)
            new = together(rules, step, mu, nu, g, state.own, params, workers, mean_in_full)
        full, one_bit = bytes_sent(updates, workers)
        return in_types_of(updates, new.updates), ZeroOneAdamState(
            count=step.count,
            mu=in_types_of(state.mu, new.mu),
            nu=new.nu,
            policy=policy,
            rates=jnp.where(step.local, step.rates, 0.0),
            own=new.own,
            eps=jnp.asarray(eps, jnp.float32),
            sent=jnp.asarray([full, one_bit, 0.0, one_bit], jnp.float32)[kind],
            nu_count=nu_count,
        )

    optimizer = optax.GradientTransformationExtraArgs(init, update)
    if skip_nonfinite:
        optimizer = averaging.skip_nonfinite(optimizer, axis_name)
    return refusing_left_out_workers(optimizer, workers)


def _init_own(params: Any, mu_dtype: DTypeLike | None, workers: Workers | None) -> Any:
    """Return the initial local progress of each worker."""
    if workers is None:
        return OwnWay(None, moments_like(params), None)

    def each(number: int) -> OwnWay:
        momentum, moved = moments_like(params, mu_dtype), moments_like(params)
        return OwnWay(momentum, moved, init_error_feedback(params, number, workers.specs))

    return unlike_params(
        params, lambda: per_worker_zeros(each, workers.axis_name, workers.num_workers)
    )
