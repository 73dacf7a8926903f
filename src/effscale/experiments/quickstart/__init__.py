"""Train a small GPT on real text, end to end."""

from effscale.experiments.quickstart.config import PRESETS, Config
from effscale.experiments.quickstart.experiment import Result, load, main, run, sample

__all__ = ["PRESETS", "Config", "Result", "load", "main", "run", "sample"]
