"""BLOOM and BLOOMZ at small scale: a multilingual corpus, pretraining, prompted multitask fine-tuning, zero-shot evaluation."""

from effscale.experiments.bloom.config import PRESETS, Config
from effscale.experiments.bloom.experiment import main, run

__all__ = ["PRESETS", "Config", "main", "run"]
