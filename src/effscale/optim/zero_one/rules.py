"""The update rules of one step of 0/1 Adam, for one worker and for several."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from effscale.optim import moments
from effscale.optim.averaging import zeros_of_mean
from effscale.optim.compressed_mean import ErrorFeedback
from effscale.optim.moments import (
    corrected,
    in_float32,
    in_types_of,
    is_zero,
    lerp,
    masked,
    normalized,
    where_known,
)
from effscale.optim.workers import Workers, compressed
from effscale.optim.zero_one.policies import PoliciesState, Round
from effscale.parallel.workers import PerWorker

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
