"""Sequence-length curriculum: start with short sequences, to stay stable at 8x the batch size and 4x the learning rate."""

from effscale.experiments.seqlen_curriculum.config import PRESETS, Config
from effscale.experiments.seqlen_curriculum.experiment import main, run

__all__ = ["PRESETS", "Config", "main", "run"]
