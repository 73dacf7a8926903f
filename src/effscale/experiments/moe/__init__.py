"""Compare dense models, mixtures of experts and their students, trained for the same number of steps."""

from effscale.experiments.moe.config import PRESETS, Config
from effscale.experiments.moe.experiment import main, run

__all__ = ["PRESETS", "Config", "main", "run"]
