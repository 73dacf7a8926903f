"""A training step of a large model compiled for a machine that is not here: what it takes, and an estimate of how fast it is."""

from effscale.experiments.scale.config import PRESETS, Config
from effscale.experiments.scale.experiment import main, run

__all__ = ["PRESETS", "Config", "main", "run"]
