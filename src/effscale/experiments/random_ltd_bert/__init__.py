"""Pretrain a small BERT on real text with and without random-LTD, for the same number of steps, then fine-tune both on a task."""

from effscale.experiments.random_ltd_bert.config import PRESETS, Config
from effscale.experiments.random_ltd_bert.experiment import main, run

__all__ = ["PRESETS", "Config", "main", "run"]
