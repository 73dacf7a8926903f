"""Pretrain a small GPT and a small BERT on real text with workers that exchange one bit per parameter."""

from effscale.experiments.onebit.config import PRESETS, Config
from effscale.experiments.onebit.experiment import main, run

__all__ = ["PRESETS", "Config", "main", "run"]
