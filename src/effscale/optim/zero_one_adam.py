"""0/1 Adam: a variance that is updated less and less often, then steps in which the workers send nothing."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from effscale.optim import averaging, moments
from effscale.optim.averaging import zeros_of_mean
from effscale.optim.compressed_mean import ErrorFeedback, init_error_feedback
from effscale.optim.moments import (
    check_count,
    check_moments,
    corrected,
    in_float32,
    in_types_of,
    is_zero,
    lerp,
    masked,
    moments_like,
    normalized,
    unlike_params,
    where_known,
)
from effscale.optim.workers import (
    Workers,
    axis_of,
    bytes_sent,
    check_local,
    clipped_locally,
    clipped_mean,
    compressed,
    per_worker_zeros,
    refusing_left_out_workers,
)
from effscale.optim.zero_one_policies import Policies, PoliciesState, Round
from effscale.parallel.workers import MovesParams, PerWorker, SendsBytes, as_local
from effscale.training.clipping import Clip, check_clip
from effscale.training.schedules import value_at

VarDecay = Literal["update", "step"]
"""When the variance decays by ``b2``. ``update``: once per update of the variance, as in the paper. ``step``: once per
step, so an update applies b2 to the power of the steps since the last; the variance is then as old as Adam's, and
learned from fewer gradients."""


class OwnWay(NamedTuple):
    """How far a worker has moved from the shared parameters since the last synchronization.

    Attributes:
        momentum: The part of its momentum that comes from its own gradients, in ``mu_dtype``.
        moved: The sum of learning rate times momentum, float32; divided by the root of the variance it is the distance of the
            worker from the shared parameters.
        errors: The worker's `ErrorFeedback`.
    """

    momentum: Any
    moved: Any
    errors: ErrorFeedback | None


class Step(NamedTuple):
    """What is known about a step before its gradients.

    Attributes:
        kind: Its `Round`.
        before: The counters of the policies before it.
        rate: Its learning rate.
        rates_before: The sum of the learning rates since the last synchronization, without this step's.
        count: The number of steps, including this one.
        nu_count: The number of times the variance has decayed by ``b2``, including this step; None without bias correction.
    """

    kind: jax.Array
    before: PoliciesState
    rate: Any
    rates_before: jax.Array
    count: Any
    nu_count: Any

    @property
    def variance(self) -> jax.Array:
        """Whether the variance is updated."""
        return self.kind == int(Round.VARIANCE)

    @property
    def local(self) -> jax.Array:
        """Whether this is a local step."""
        return self.kind == int(Round.LOCAL)

    @property
    def sync(self) -> jax.Array:
        """Whether the workers synchronize."""
        return self.kind == int(Round.SYNC)

    @property
    def first_stage(self) -> jax.Array:
        """Whether the variance is still being learned."""
        return ~(self.local | self.sync)

    @property
    def ends_first_stage(self) -> jax.Array:
        """Whether this is the first step after the first stage."""
        return ~self.first_stage & ~self.before.local

    @property
    def rates(self) -> jax.Array:
        """The sum of the learning rates since the last synchronization, including this step's; 0 in the first stage."""
        return jnp.where(self.first_stage, 0.0, self.rates_before + self.rate)

    @property
    def since(self) -> jax.Array:
        """``rates`` in a synchronization; in other steps the quotient is unused and must not be 0 / 0."""
        return jnp.where(self.sync, self.rates, 1.0)


class Rules(NamedTuple):
    """The options of the update rules."""

    b1: Any
    b2: Any
    eps: Any
    weight_decay: Any
    mask: Any
    var_decay: VarDecay
    bias_correction: bool
    exp_avg_mask: Any

    def unbiased(self, when: Any, mu: Any, nu: Any, count: Any, nu_count: Any) -> tuple[Any, Any]:
        """Return the moments, corrected for their start at zero where ``when`` holds, after ``count`` steps and ``nu_count`` decays."""
        if not self.bias_correction:
            return mu, nu
        of_mu = jnp.where(when, moments.bias_correction(self.b1, count), 1.0)
        of_nu = jnp.where(when, moments.bias_correction(self.b2, nu_count), 1.0)
        return corrected(mu, of_mu), corrected(nu, of_nu)

    def moving(self, tree: Any, nu: Any, params: Any) -> Any:
        """Return the tree, with zero where the mask or a variance of zero prevents movement."""
        return where_known(masked(tree, self.exp_avg_mask, params), nu)

    def learned(self, nu: Any, g: Any, step: Step) -> Any:
        """Return the variance, updated with the squared mean gradient in a step of its policy."""

        def one(v: Any, x: Any) -> Any:
            by_update = self.var_decay == "update"
            decay = self.b2 if by_update else self.b2 ** step.before.var_age.astype(v.dtype)
            return jnp.where(step.variance, lerp(v, jnp.square(x), decay), v)

        return jax.tree.map(one, nu, g)

    def updates(self, way: Any, mu: Any, nu: Any, params: Any, step: Step) -> Any:
        """Return the updates, minus ``way`` along mu / (sqrt(nu) + eps) + weight_decay * params."""
        mu, nu = self.unbiased(step.first_stage, mu, nu, step.count, step.nu_count)
        out = jax.tree.map(lambda m, v: normalized(way * m, v, self.eps), mu, nu)
        if not is_zero(self.weight_decay):
            decay = optax.add_decayed_weights(way * self.weight_decay, self.mask)
            out, _ = decay.update(out, decay.init(params), in_float32(params))
        return jax.tree.map(jnp.negative, out)


class Moved(NamedTuple):
    """The result of a step: updates in float32, momentum, variance, and the workers' local progress."""

    updates: Any
    mu: Any
    nu: Any
    own: Any


def alone(rules: Rules, step: Step, mu: Any, nu: Any, g: Any, own: OwnWay, params: Any) -> Moved:
    """Make a step on a single worker, where each step updates the parameters."""
    one_bit = step.first_stage & ~step.variance
    mu = lerp(mu, _select(one_bit, rules.moving(g, nu, params), g), rules.b1)
    mu = _select(step.first_stage, mu, rules.moving(mu, nu, params))
    nu = rules.learned(nu, g, step)
    moved = jax.tree.map(lambda u, m: u + step.rate * m, own.moved, mu)
    out = rules.updates(step.rate, mu, nu, params, step)
    mu = jax.tree.map(lambda m, u: jnp.where(step.sync, u / step.since, m), mu, moved)
    return Moved(out, mu, nu, own._replace(moved=_where(step.local, moved)))


def together(
    rules: Rules,
    step: Step,
    mu: Any,
    nu: Any,
    g: Any,
    own: PerWorker,
    params: Any,
    workers: Workers,
    mean_in_full: Callable[[], Any],
) -> Moved:
    """Make a step on one of several workers with gradient ``g``; ``mean_in_full`` averages gradients uncompressed."""
    mine: OwnWay = own.value
    momentum = lerp(in_types_of(nu, mine.momentum), g, rules.b1)
    ahead = jax.tree.map(lambda m, r: rules.b1 * m + r, mu, momentum)
    ahead = rules.moving(ahead, nu, params)
    moved = jax.tree.map(lambda u, m: u + step.rate * m, mine.moved, ahead)
    # In the first stage the errors belong to gradients; from here on they belong to `moved`.
    errors = _where(step.first_stage | step.before.local, mine.errors)

    def in_full() -> Any:
        return in_types_of(nu, mean_in_full()), errors

    def in_one_bit() -> Any:
        return compressed(_select(step.first_stage, where_known(g, nu), moved), errors, workers)

    def not_at_all() -> Any:
        return jax.tree.map(zeros_of_mean, nu), errors

    # Everything else runs in every round, as XLA copies what a conditional passes through.
    which = jnp.array([0, 1, 2, 1])[step.kind]
    mean, errors = jax.lax.switch(which, [in_full, in_one_bit, not_at_all])
    mean = _select(step.variance, mean, rules.moving(mean, nu, params))
    keep = jnp.where(step.sync, 0.0, rules.b1)
    gain = jnp.where(step.first_stage, 1 - rules.b1, jnp.where(step.sync, 1 / step.since, 0.0))
    mu = jax.tree.map(lambda m, x: keep * m + gain * x, mu, mean)
    nu = rules.learned(nu, mean, step)
    way = jnp.where(step.first_stage, step.rate, jnp.where(step.sync, step.rates, 0.0))
    momentum = in_types_of(mine.momentum, _where(step.local, momentum))
    after = OwnWay(momentum, _where(step.local, moved), errors)
    out = rules.updates(way, mu, nu, params, step)
    return Moved(out, mu, nu, PerWorker(after, own.axis_name))


def _select(condition: Any, these: Any, others: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), these, others)


def _where(condition: Any, tree: Any) -> Any:
    """Return the tree, and zeros where the condition does not hold."""
    return jax.tree.map(lambda x: jnp.where(condition, x, jnp.zeros_like(x)), tree)


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
