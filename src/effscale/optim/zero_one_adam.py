"""0/1 Adam: a variance that is updated ever more seldom, then steps in which the workers send nothing."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from effscale.optim import moments, skipping
from effscale.optim.averaging import bytes_sent, check_local, check_workers
from effscale.optim.clipping import Clip, check_clip, clipped_locally, clipped_mean
from effscale.optim.freezing import check_moments
from effscale.optim.moments import (
    check_mu_dtype,
    corrected,
    lerp,
    masked,
    moments_like,
    normalised,
    where_known,
)
from effscale.optim.options import check_count
from effscale.optim.params_like import unlike_params
from effscale.optim.precision import in_float32, in_types_of, zeros_of_mean
from effscale.optim.weight_decay import is_zero
from effscale.optim.zero_one_policies import Policies, PolicyState, Round
from effscale.parallel.onebit.error_feedback import ErrorFeedback, init_error_feedback
from effscale.parallel.onebit.exchange import Scales
from effscale.parallel.onebit.mean import compressed_mean
from effscale.parallel.worker_zeros import per_worker_zeros
from effscale.parallel.workers import PerWorker, as_local
from effscale.training.schedules import value_at

VarDecay = Literal["update", "step"]
"""What the variance decays by ``b2`` in. ``update``: each of its updates, as in the paper. ``step``: each step, so in an update by b2
to the power of the steps since the last; then the variance is as old as Adam's, and learned from fewer gradients."""


class OwnWay(NamedTuple):
    """What a worker did by itself since the last synchronisation.

    Attributes:
        momentum: The part of its momentum that comes from its own gradients, in ``mu_dtype``.
        moved: float32, the sum of learning rate times momentum; divided by the root of the variance it is how far the
            worker went from the shared parameters.
        errors: The worker's `ErrorFeedback`.
    """

    momentum: Any
    moved: Any
    errors: ErrorFeedback | None


class ZeroOneAdamState(NamedTuple):
    """State of `zero_one_adam`.

    Attributes:
        count: int32, updates made.
        mu: The momentum that the workers share, in ``mu_dtype``; within local steps it only decays.
        nu: The variance.
        policy: The counters of both policies.
        rates: float32, the sum of learning rates since the last synchronisation.
        own: What each worker did by itself, a `PerWorker` of `OwnWay`. On one worker an `OwnWay` with ``moved`` only.
        eps: float32, what is added to the root of the variance.
        sent: float32, bytes that each worker's device sent in the last update, by formula.
        nu_count: int32, how often the variance has decayed by ``b2``; None without ``bias_correction``.
    """

    count: Any
    mu: Any
    nu: Any
    policy: PolicyState
    rates: Any
    own: Any
    eps: Any
    sent: Any
    nu_count: Any = None

    def local_params(self, params: Any) -> Any:
        """The parameters where a worker stands, within `effscale.parallel.per_worker`."""
        if not isinstance(self.own, PerWorker):
            return params
        moved, shared = self.own.value.moved, as_local(params, self.own.axis_name)
        is_masked = lambda node: isinstance(node, optax.MaskedNode)

        def local(u: Any, p: Any, v: Any) -> Any:
            if is_masked(u):  # another optimizer's, by optax.masked or optax.partition
                return p
            return (p.astype(u.dtype) - normalised(u, v, self.eps)).astype(p.dtype)

        return jax.tree.map(local, moved, shared, self.nu, is_leaf=is_masked)


def _select(condition: Any, these: Any, others: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), these, others)


def _where(condition: Any, tree: Any) -> Any:
    """The tree, and zeros where the condition does not hold."""
    return jax.tree.map(lambda x: jnp.where(condition, x, jnp.zeros_like(x)), tree)


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
    clip_norm: ArrayLike | None = None,
    clip: Clip = "synchronised",
    axis_name: str | None = None,
    num_workers: int | None = None,
    scales: Scales = "tensor",
    specs: Any = None,
    skip_nonfinite: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""0/1 Adam with decoupled weight decay.

    Up to ``var_freeze_step``: at the steps of the variance's policy (`Policies`) gradients are averaged in full and

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2

    At the others gradients are averaged in one bit and v stays. That gradients are compressed here, and not the momentum
    as in the paper, is DeepSpeed's way. Then v stays for good, and each worker r goes its own way until the next step of
    the second policy:

    .. math:: m_r \leftarrow \beta_1 m_r + (1 - \beta_1) g_r, \quad u_r \leftarrow u_r + \gamma m_r, \quad
        x_r = x - u_r / (\sqrt v + \epsilon)

    where all agree on :math:`\bar u`, the mean of u in one bit, and set :math:`x \leftarrow x - \bar u / (\sqrt v +
    \epsilon)`, :math:`m \leftarrow \bar u / \sum \gamma`, :math:`u \leftarrow 0`. There is no ``scale_by_zero_one_adam``, as what is
    exchanged holds the learning rate.

    Nothing is corrected for bias, so that the first steps are several times as long as Adam's: in the place of ``optax.adam``
    give ``bias_correction=True`` (`effscale.optim.onebit_adam` has the numbers). Then the moments of the first stage are
    corrected as in Adam, and once more, for good, when the variance is frozen: from there on no weight in them is left to a
    start at zero.

    The parameters x that the optimizer updates are the shared ones: between synchronisations its updates are zero, and
    evaluation and checkpoints see what all workers agreed on last. A worker's gradient has to be taken at
    ``effscale.parallel.worker_params(params, opt_state)``, which is :math:`x_r`. On one worker there is nobody to wait
    for, and each step updates the parameters.

    Args:
        learning_rate: A number or a schedule (also one by tokens).
        b1: Decay of the momentum.
        b2: Decay of the variance.
        eps: Added to the root of the variance.
        weight_decay: Decoupled. With several workers it acts when they synchronise, on the shared parameters, with
            the sum of the learning rates; DeepSpeed mixes it into the momentum.
        mask: Which parameters decay, as in ``optax.adamw``.
        var_freeze_step: Updates of the first stage; the paper takes those in which the learning rate rises. More than
            the run has: no local steps.
        var_update_scaler: Updates of the variance after which their interval doubles, the paper's kappa.
        var_decay: Whether b2 acts once an ``update`` of the variance, as in the paper, or once a ``step`` between two. The first
            keeps gradients for 1 / (1 - b2) updates, which are ever further apart, so those of the start for long.
        local_step_scaler: Steps after which the interval of local steps doubles; see `halving_steps`.
        local_step_clipper: The longest interval, the paper's H.
        bias_correction: Whether the moments are corrected for having begun at zero.
        mu_dtype: The type in which the momentum is kept; None for at least float32.
        exp_avg_mask: As for `effscale.optim.scale_by_onebit_adam`.
        clip_norm: Greatest norm of the gradient.
        clip: By which norm; see `effscale.optim.scale_by_onebit_adam`.
        axis_name: The workers' axis; None trains on one worker.
        num_workers: Only where no mesh says it.
        scales: One scale a ``tensor``, or one for the whole ``tree``.
        specs: See `effscale.parallel.compressed_mean`.
        skip_nonfinite: Whether a step in which any worker has a gradient that is not finite is skipped by all; see
            `effscale.optim.skip_nonfinite`.

    Returns:
        An optax transformation. Its update needs the parameters where there is weight decay, or an ``exp_avg_mask`` that is
        a function of them.

    Raises:
        ValueError: As for `effscale.optim.scale_by_onebit_adam`; or the update gets no parameters though it has weight
            decay.

    Example:
        >>> optimizer = zero_one_adam(0.1, var_freeze_step=20, local_step_scaler=10)
        >>> params = jnp.array([1.0, -2.0])
        >>> state = optimizer.init(params)
        >>> for _ in range(60):
        ...     updates, state = optimizer.update(jax.grad(lambda p: (p**2).sum())(params), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> bool(abs(params).max() < 0.2)
        True

    References:
        Lu et al., `0/1 Adam <https://arxiv.org/abs/2202.06009>`_, 2022
    """
    check_moments(b1, b2, eps)
    check_clip(clip_norm, clip)
    check_workers(axis_name, num_workers, scales)
    check_mu_dtype(mu_dtype)
    policies = Policies(var_freeze_step, var_update_scaler, local_step_scaler, local_step_clipper)
    policies.check()
    if var_decay not in get_args(VarDecay):
        raise ValueError(
            f"var_decay={var_decay!r} is unknown; one of {', '.join(get_args(VarDecay))}"
        )
    check_count(
        "var_freeze_step", var_freeze_step, 1, ": the variance is learned before it is frozen"
    )

    def init(params: Any) -> Any:
        def each(workers: int) -> OwnWay:
            momentum, moved = moments_like(params, mu_dtype), moments_like(params)
            return OwnWay(momentum, moved, init_error_feedback(params, workers, specs))

        own: Any = OwnWay(None, moments_like(params), None)
        if axis_name is not None:
            own = unlike_params(params, lambda: per_worker_zeros(each, axis_name, num_workers))
        return ZeroOneAdamState(
            count=jnp.zeros((), jnp.int32),
            mu=moments_like(params, mu_dtype),
            nu=moments_like(params),
            policy=policies.init(),
            rates=jnp.zeros((), jnp.float32),
            own=own,
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
        # Without a learning rate nobody moved, and the momentum cannot be told from the way.
        stuck = (kind == int(Round.SYNC)) & (state.rates + rate <= 0)
        kind = jnp.where(stuck, int(Round.LOCAL), kind)
        variance, local, sync = (kind == int(r) for r in (Round.VARIANCE, Round.LOCAL, Round.SYNC))
        first_stage = ~(local | sync)
        rates = jnp.where(first_stage, 0.0, state.rates + rate)
        # Outside of a synchronisation the quotient is not used, and must not be 0 / 0.
        since = jnp.where(sync, rates, 1.0)
        wide = lambda tree: in_types_of(state.nu, tree)
        count, nu_count = optax.safe_increment(state.count), state.nu_count
        if bias_correction:
            decays = 1 if var_decay == "update" else state.policy.var_age
            nu_count = nu_count + jnp.where(variance, decays, 0)

        def unbiased(when: Any, mu: Any, nu: Any, count: Any, nu_count: Any) -> tuple[Any, Any]:
            """The moments after so many steps and decays of the variance, corrected for their start at zero where ``when`` holds."""
            if not bias_correction:
                return mu, nu
            of_mu = jnp.where(when, moments.bias_correction(b1, count), 1.0)
            of_nu = jnp.where(when, moments.bias_correction(b2, nu_count), 1.0)
            return corrected(mu, of_mu), corrected(nu, of_nu)

        # In the first stage only what moves the parameters is corrected, and with its end the moments themselves, for good.
        ended = ~first_stage & ~state.policy.local
        last_mu, last_nu = unbiased(ended, wide(state.mu), state.nu, state.count, state.nu_count)
        g = clipped_locally(wide(updates), axis_name, clip_norm, clip)

        def moving(tree: Any) -> Any:
            """The tree, and zero where the mask or a variance that was never learned says that nothing moves."""
            return where_known(masked(tree, exp_avg_mask, params), last_nu)

        def learned(g: Any) -> Any:
            """The variance, with the squares of averages in a step of its policy."""

            def one(v: Any, x: Any) -> Any:
                decay = b2 if var_decay == "update" else b2 ** state.policy.var_age.astype(v.dtype)
                return jnp.where(variance, lerp(v, jnp.square(x), decay), v)

            return jax.tree.map(one, last_nu, g)

        def moves(way: Any, mu: Any, nu: Any) -> Any:
            """Minus the way along mu / (sqrt(nu) + eps) + weight_decay * params, in the types of the updates."""
            mu, nu = unbiased(first_stage, mu, nu, count, nu_count)
            out = jax.tree.map(lambda m, v: normalised(way * m, v, eps), mu, nu)
            if not is_zero(weight_decay):
                decay = optax.add_decayed_weights(way * weight_decay, mask)
                out, _ = decay.update(out, decay.init(params), in_float32(params))
            return jax.tree.map(jnp.negative, in_types_of(updates, out))

        def alone() -> Any:
            one_bit = first_stage & ~variance
            mu = lerp(last_mu, _select(one_bit, moving(g), g), b1)
            mu = _select(first_stage, mu, moving(mu))
            nu = learned(g)
            moved = jax.tree.map(lambda u, m: u + rate * m, state.own.moved, mu)
            out = moves(rate, mu, nu)
            mu = jax.tree.map(lambda m, u: jnp.where(sync, u / since, m), mu, moved)
            return out, mu, nu, state.own._replace(moved=_where(local, moved))

        def together(axis_name: str) -> Any:
            own: OwnWay = state.own.value
            momentum = lerp(wide(own.momentum), g, b1)
            ahead = moving(jax.tree.map(lambda m, r: b1 * m + r, last_mu, momentum))
            moved = jax.tree.map(lambda u, m: u + rate * m, own.moved, ahead)
            # The errors were those of gradients in the first stage; from here on they are those of `moved`.
            errors = _where(first_stage | state.policy.local, own.errors)

            def in_full() -> Any:
                return wide(clipped_mean(updates, axis_name, clip_norm, clip)), errors

            def in_one_bit() -> Any:
                tree = _select(first_stage, where_known(g, last_nu), moved)
                return compressed_mean(tree, errors, axis_name, scales=scales, specs=specs)

            def not_at_all() -> Any:
                return jax.tree.map(zeros_of_mean, last_nu), errors

            # All else is done in any round: what a conditional hands through, XLA copies.
            which = jnp.array([0, 1, 2, 1])[kind]
            mean, errors = jax.lax.switch(which, [in_full, in_one_bit, not_at_all])
            mean = _select(variance, mean, moving(mean))
            keep = jnp.where(sync, 0.0, b1)
            gain = jnp.where(first_stage, 1 - b1, jnp.where(sync, 1 / since, 0.0))
            mu = jax.tree.map(lambda m, x: keep * m + gain * x, last_mu, mean)
            nu = learned(mean)
            way = jnp.where(first_stage, rate, jnp.where(sync, rates, 0.0))
            momentum = in_types_of(own.momentum, _where(local, momentum))
            after = OwnWay(momentum, _where(local, moved), errors)
            return moves(way, mu, nu), mu, nu, PerWorker(after, axis_name)

        out, mu, nu, own = alone() if axis_name is None else together(axis_name)
        full, one_bit = bytes_sent(updates, axis_name, scales, specs)
        return out, ZeroOneAdamState(
            count=count,
            mu=in_types_of(state.mu, mu),
            nu=nu,
            policy=policy,
            rates=jnp.where(local, rates, 0.0),
            own=own,
            eps=jnp.asarray(eps, jnp.float32),
            sent=jnp.asarray([full, one_bit, 0.0, one_bit], jnp.float32)[kind],
            nu_count=nu_count,
        )

    optimizer = optax.GradientTransformationExtraArgs(init, update)
    return skipping.skip_nonfinite(optimizer, axis_name) if skip_nonfinite else optimizer
