"""A small GPT and a small BERT learn from real text between workers that send one bit per number."""

from effscale.experiments.onebit.config import PRESETS, Config
from effscale.experiments.onebit.experiment import main, run

__all__ = ["PRESETS", "Config", "main", "run"]
