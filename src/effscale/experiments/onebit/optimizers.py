"""The optimizers that the experiment ``onebit`` compares, on one schedule."""

import dataclasses
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from effscale.optim import (
    Policies,
    Workers,
    compressed_mean,
    compressed_mean_bytes,
    init_error_feedback,
    onebit_adam,
    onebit_lamb,
    scale_by_onebit_adam,
    skip_nonfinite,
    zero_one_adam,
)
from effscale.options import Bounds, Fraction, Options, PositiveFloat, PositiveInt, ProperFraction
from effscale.parallel import PerWorker, SendsBytes
from effscale.training import Clip, ScheduleConfig
from effscale.training.schedules import Schedule, scale_by_learning_rate

OptimizerName = Literal["adam", "onebit_adam", "zero_one_adam", "naive", "lamb", "onebit_lamb"]

# Shares of a run's steps, the papers' for BERT-Large.
WARMUP = 12.5 / 152
ONEBIT_ADAM_FREEZE = 23 / 152
ONEBIT_LAMB_FREEZE = 1000 / 5993
LOCAL_STEP_SCALER = 32.678 / 152

CLIP = Clip(1.0)  # the root mean square of the workers' gradient norms


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroOne(Options):
    """Stages of 0/1 Adam; the defaults are the paper's for BERT-Large."""

    var_freeze: Annotated[float, Bounds(above=0, below=1)] = WARMUP
    """Fraction of the steps in which the variance is updated: 12,500 of 152,000, as long as the warmup."""
    var_decay: Literal["update", "step"] = "update"
    """Whether b2 applies once per variance update, as in the paper, or once per step between two updates."""
    local_step_clipper: PositiveInt = 16
    """The longest interval between exchanges, in steps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimization(Options):
    """What all optimizers of a task share."""

    steps: PositiveInt
    """Optimizer steps of pretraining."""
    adam_rate: PositiveFloat
    """Peak learning rate of all optimizers except the LAMB ones."""
    lamb_rate: PositiveFloat
    """Peak learning rate of the LAMB optimizers."""
    final: Fraction = 0.0
    """Final learning rate, as a fraction of the peak."""
    b2: ProperFraction = 0.98
    """Decay rate of the variance. The variance is learned only in the first stage, so a short run needs less than the papers' 0.999."""
    factor_max: Annotated[float, Bounds(at_least=0.5)] = 1.0
    """Maximum factor of 1-bit LAMB's frozen coefficient.
    DeepSpeed uses 4, for b2 = 0.999; with this b2 the factor would grow until the loss diverges."""
    zero_one: ZeroOne = ZeroOne()
    """Stages of 0/1 Adam."""

    def steps_of(self, share: float) -> int:
        """Return a share of the steps, at least one."""
        return max(1, round(share * self.steps))

    def policies(self) -> Policies:
        """Return when 0/1 Adam updates its variance, and when it sends."""
        return Policies(
            var_freeze_step=self.steps_of(self.zero_one.var_freeze),
            local_step_scaler=self.steps_of(LOCAL_STEP_SCALER),
            local_step_clipper=self.zero_one.local_step_clipper,
        )

    def learning_rate(self, name: OptimizerName) -> Schedule:
        """Return a linear warmup to the peak, then a linear decay to the fraction ``final`` of it."""
        peak = self.lamb_rate if name in ("lamb", "onebit_lamb") else self.adam_rate
        warmup = self.steps_of(WARMUP)
        total, final = max(self.steps, warmup + 1), self.final * peak
        return ScheduleConfig(
            kind="linear", peak=peak, warmup=warmup, total=total, final=final
        ).build()

    def build(self, name: OptimizerName, workers: Workers) -> optax.GradientTransformation:
        """Return an optimizer; the uncompressed baselines run the same code, which never freezes."""
        rate, b1, b2, decay = self.learning_rate(name), 0.9, self.b2, 0.01
        shared: Any = {"weight_decay": decay, "clip": CLIP, "workers": workers}
        never = self.steps + 1
        if name == "adam":
            return onebit_adam(rate, b1, b2, freeze_step=never, **shared)
        if name == "onebit_adam":
            freeze_step = self.steps_of(ONEBIT_ADAM_FREEZE)
            return onebit_adam(rate, b1, b2, freeze_step=freeze_step, **shared)
        if name == "zero_one_adam":
            shared |= {"var_decay": self.zero_one.var_decay, **self.policies()._asdict()}
            return zero_one_adam(rate, b1, b2, **shared)
        if name == "lamb":
            return onebit_lamb(rate, b1, b2, freeze_step=never, **shared)
        if name == "onebit_lamb":
            shared |= {"factor_max": self.factor_max}
            freeze_step = self.steps_of(ONEBIT_LAMB_FREEZE)
            return onebit_lamb(rate, b1, b2, freeze_step=freeze_step, **shared)
        naive = optax.chain(
            onebit_gradients(CLIP, workers),
            scale_by_onebit_adam(b1, b2, freeze_step=never),
            optax.add_decayed_weights(decay),
            scale_by_learning_rate(rate),
        )
        return skip_nonfinite(naive, workers.axis_name)


@SendsBytes.register
class OneBitGradientsState(NamedTuple):
    """State of ``onebit_gradients``: the compression error of each worker, and the bytes that it sent in the last update."""

    errors: PerWorker
    sent: jax.Array


def onebit_gradients(clip: Clip, workers: Workers) -> optax.GradientTransformation:
    """Average the gradients of simulated workers with one bit per parameter and error feedback: suitable for SGD, but not for Adam.

    Adam's variance is the square of its input. From signs with one scale per tensor it learns the same value for all
    elements.

    References:
        Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence Speed" (2021).
            https://arxiv.org/abs/2102.02888
    """
    axis, number = workers.axis_name, workers.num_workers
    if number is None:
        raise ValueError("workers.num_workers must be given for naive 1-bit gradients, got None")

    def init(params: Any) -> Any:
        errors = init_error_feedback(params, number)
        zeros = jax.tree.map(lambda x: jnp.zeros((number, *x.shape), x.dtype), errors)
        return OneBitGradientsState(PerWorker(zeros, axis), jnp.zeros((), jnp.float32))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        norm = jnp.sqrt(jax.lax.pmean(optax.tree.norm(updates, squared=True), axis))
        clipped = jax.tree.map(lambda g: g * clip.factor(norm), updates)
        mean, errors = compressed_mean(clipped, state.errors.value, axis)
        sent = jnp.float32(compressed_mean_bytes(updates, number))
        return mean, OneBitGradientsState(PerWorker(errors, axis), sent)

    return optax.GradientTransformation(init, update)
