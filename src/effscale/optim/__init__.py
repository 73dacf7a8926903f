"""1-bit optimizers as optax transformations, which send one bit per number or nothing: 1-bit Adam, 0/1 Adam, 1-bit LAMB."""

from typing import TYPE_CHECKING

from effscale.lazy import lazy_package

if TYPE_CHECKING:
    from effscale.optim.averaging import mean_over_workers, skip_nonfinite
    from effscale.optim.compressed_mean import compressed_mean, init_error_feedback
    from effscale.optim.freezing import VarianceRatio, params_without_variance
    from effscale.optim.lamb import lamb
    from effscale.optim.onebit_adam import onebit_adam, scale_by_onebit_adam
    from effscale.optim.onebit_lamb import onebit_lamb
    from effscale.optim.tensor_layout import compressed_mean_bytes, mean_bytes
    from effscale.optim.workers import Workers
    from effscale.optim.zero_one_adam import zero_one_adam
    from effscale.optim.zero_one_policies import Policies, Round, halving_steps

__all__ = [
    "Policies",
    "Round",
    "VarianceRatio",
    "Workers",
    "compressed_mean",
    "compressed_mean_bytes",
    "halving_steps",
    "init_error_feedback",
    "lamb",
    "mean_bytes",
    "mean_over_workers",
    "onebit_adam",
    "onebit_lamb",
    "params_without_variance",
    "scale_by_onebit_adam",
    "skip_nonfinite",
    "zero_one_adam",
]

lazy_package(__name__)
