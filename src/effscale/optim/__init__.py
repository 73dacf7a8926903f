"""Optimizers that send one bit a number, or nothing, as optax transformations: 1-bit Adam, 0/1 Adam, 1-bit LAMB."""

from effscale.optim.deepspeed import optimizer_from_deepspeed
from effscale.optim.freezing import VarianceRatio
from effscale.optim.gradients import mean_over_workers, skip_nonfinite
from effscale.optim.lamb import lamb, scale_by_lamb
from effscale.optim.onebit_adam import onebit_adam, scale_by_onebit_adam
from effscale.optim.onebit_lamb import onebit_lamb, scale_by_onebit_lamb
from effscale.optim.zero_one_adam import scale_by_zero_one_adam, zero_one_adam
from effscale.optim.zero_one_policies import Policies, Round, halving_steps

__all__ = [
    "Policies",
    "Round",
    "VarianceRatio",
    "halving_steps",
    "lamb",
    "mean_over_workers",
    "onebit_adam",
    "onebit_lamb",
    "optimizer_from_deepspeed",
    "scale_by_lamb",
    "scale_by_onebit_adam",
    "scale_by_onebit_lamb",
    "scale_by_zero_one_adam",
    "skip_nonfinite",
    "zero_one_adam",
]
