"""The optimizers that the experiment ``onebit`` compares, on one schedule, and the data that each sends."""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
import optax

from effscale.models.validation import check, check_finite
from effscale.optim import (
    Policies,
    Round,
    Workers,
    onebit_adam,
    onebit_lamb,
    scale_by_onebit_adam,
    skip_nonfinite,
    zero_one_adam,
)
from effscale.optim.workers import (
    agree,
    bytes_sent,
    check_local,
    clipped_locally,
    init_errors,
)
from effscale.parallel import PerWorker, SendsBytes
from effscale.training import Clip, Schedule, ScheduleConfig
from effscale.training.schedules import scale_by_learning_rate

AXIS = "data"

OptimizerName = Literal["adam", "onebit_adam", "zero_one_adam", "naive", "lamb", "onebit_lamb"]
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)

TWINS: dict[OptimizerName, OptimizerName] = {
    "onebit_adam": "adam",
    "zero_one_adam": "adam",
    "naive": "adam",
    "onebit_lamb": "lamb",
}
"""The uncompressed baseline of each optimizer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stages:
    """When compression begins, as fractions of a run's steps; the defaults are the papers' for BERT-Large."""

    onebit_adam: float = 23 / 152
    """Fraction of 1-bit Adam's steps that are uncompressed: 23,000 of 152,000."""
    onebit_lamb: float = 1000 / 5993
    """Fraction of 1-bit LAMB's steps that are uncompressed: 1,000 of 5,993."""
    zero_one_adam: float = 12.5 / 152
    """Fraction of the steps in which 0/1 Adam updates its variance: 12,500 of 152,000, as long as the warmup."""
    var_update_scaler: int = 16
    """Number of variance updates after which 0/1 Adam doubles the interval between them."""
    var_decay: Literal["update", "step"] = "update"
    """Whether 0/1 Adam applies b2 once per variance update, as in the paper, or once per step between two updates."""
    local_step_scaler: float = 32.678 / 152
    """Fraction of the steps after which 0/1 Adam doubles the interval between exchanges: 32,678 of 152,000."""
    local_step_clipper: int = 16
    """The longest interval between exchanges, in steps."""
    rate_warmup: float = 12.5 / 152
    """Fraction of the steps used for warmup, for all optimizers."""

    def __post_init__(self):
        for name in (
            "onebit_adam",
            "onebit_lamb",
            "zero_one_adam",
            "local_step_scaler",
            "rate_warmup",
        ):
            check(self, 0 < getattr(self, name) < 1, name, "between 0 and 1")
        for name in ("var_update_scaler", "local_step_clipper"):
            check(self, getattr(self, name) >= 1, name, "at least 1")

    def of(
        self,
        name: Literal["onebit_adam", "onebit_lamb", "zero_one_adam", "rate_warmup"],
        steps: int,
    ) -> int:
        """Return the steps of a stage."""
        return max(1, round(getattr(self, name) * steps))

    def policies(self, steps: int) -> Policies:
        """Return the policies of 0/1 Adam."""
        return Policies(
            var_freeze_step=self.of("zero_one_adam", steps),
            var_update_scaler=self.var_update_scaler,
            local_step_scaler=max(1, round(self.local_step_scaler * steps)),
            local_step_clipper=self.local_step_clipper,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moments:
    """Options that all optimizers share."""

    b1: float = 0.9
    """Decay rate of the momentum."""
    b2: float = 0.98
    """Decay rate of the variance. The variance is learned only in the first stage, so a short run needs less than the papers' 0.999."""
    weight_decay: float = 0.01
    """Decoupled weight decay; included in the norm of LAMB's coefficient."""
    clip_norm: float = 1.0
    """Maximum root mean square of the workers' gradient norms."""
    factor_max: float = 1.0
    """Maximum factor of 1-bit LAMB's frozen coefficient.
    DeepSpeed uses 4, for b2 = 0.999; with this b2 the factor would grow until the loss diverges."""

    def __post_init__(self):
        check_finite(self)
        for name in ("b1", "b2"):
            check(self, 0 <= getattr(self, name) < 1, name, "from 0 to below 1")
        check(self, self.weight_decay >= 0, "weight_decay", "at least 0")
        check(self, self.clip_norm > 0, "clip_norm", "above 0")
        check(self, self.factor_max >= 0.5, "factor_max", "at least 0.5, the least factor")


def learning_rate(peak: float, final: float, steps: int, stages: Stages) -> Schedule:
    """Return a linear warmup to the peak, then a linear decay to the fraction ``final`` of it."""
    warmup = stages.of("rate_warmup", steps)
    return ScheduleConfig(
        kind="linear", peak=peak, warmup=warmup, total=max(steps, warmup + 1), final=final * peak
    ).build()


def build(
    name: OptimizerName,
    rate: Schedule,
    *,
    moments: Moments,
    stages: Stages,
    steps: int,
    workers: int | None,
) -> optax.GradientTransformationExtraArgs:
    """Build an optimizer for a step of the workers along ``AXIS``.

    Args:
        name: Name of the optimizer.
        rate: The learning rate.
        moments: Options that all optimizers share.
        stages: When compression begins.
        steps: Number of steps of the run.
        workers: Number of workers. Required if no mesh defines the axis.
    """
    b1, b2, decay, clip = moments.b1, moments.b2, moments.weight_decay, Clip(moments.clip_norm)
    among = Workers(AXIS, num_workers=workers)
    shared: Any = {"weight_decay": decay, "clip": clip, "workers": among}
    never = steps + 1  # The uncompressed baselines run the same code, which never freezes.
    if name == "adam":
        return onebit_adam(rate, b1, b2, freeze_step=never, **shared)
    if name == "onebit_adam":
        return onebit_adam(rate, b1, b2, freeze_step=stages.of(name, steps), **shared)
    if name == "zero_one_adam":
        policies = stages.policies(steps)._asdict()
        return zero_one_adam(rate, b1, b2, var_decay=stages.var_decay, **policies, **shared)
    if name == "lamb":
        return onebit_lamb(rate, b1, b2, freeze_step=never, **shared)
    if name == "onebit_lamb":
        freeze, largest = stages.of(name, steps), moments.factor_max
        return onebit_lamb(rate, b1, b2, freeze_step=freeze, factor_max=largest, **shared)
    naive = optax.chain(
        onebit_gradients(clip, among),
        scale_by_onebit_adam(b1, b2, freeze_step=never),
        optax.add_decayed_weights(decay),
        scale_by_learning_rate(rate),
    )
    return skip_nonfinite(naive, AXIS)


@SendsBytes.register
class OneBitGradientsState(NamedTuple):
    """State of ``onebit_gradients``: the compression error of each worker, and the bytes that its device sent in the last update."""

    errors: PerWorker | None
    sent: Any


def onebit_gradients(clip: Clip, workers: Workers) -> optax.GradientTransformationExtraArgs:
    """Average the gradients with one bit per parameter and error feedback: suitable for SGD, but not for Adam.

    Adam's variance is the square of its input. From signs with one scale per tensor it learns the same value for all
    elements.

    References:
        Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence Speed" (2021).
            https://arxiv.org/abs/2102.02888
    """

    def init(params: Any) -> Any:
        errors = init_errors(params, workers)
        return OneBitGradientsState(errors, jnp.zeros((), jnp.float32))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del params, extra
        check_local(updates, workers.axis_name)
        _, sent = bytes_sent(updates, workers)
        clipped = clipped_locally(updates, workers.axis_name, clip)
        mean, errors = agree(clipped, state.errors, workers)
        return mean, OneBitGradientsState(errors, jnp.float32(sent))

    return optax.GradientTransformationExtraArgs(init, update)


def rounds(name: OptimizerName, stages: Stages, steps: int) -> int:
    """Return the number of steps of a run that send more than a few scalars."""
    if name != "zero_one_adam":
        return steps
    return int((stages.policies(steps).rounds(steps) != Round.LOCAL).sum())
