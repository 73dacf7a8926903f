"""A small BERT learns to tell hidden tokens of real text, with and without random-LTD, in equally many steps; then both learn a task."""

from effscale.experiments.random_ltd_bert.config import PRESETS, Config
from effscale.experiments.random_ltd_bert.experiment import main, run

__all__ = ["PRESETS", "Config", "main", "run"]
