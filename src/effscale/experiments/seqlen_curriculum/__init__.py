"""Short sequences first, to stay stable at eight times the batch and four times the learning rate."""

from effscale.experiments.seqlen_curriculum.config import PRESETS, Config
from effscale.experiments.seqlen_curriculum.experiment import main, run

__all__ = ["PRESETS", "Config", "main", "run"]
