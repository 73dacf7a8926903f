"""Ablations of BLOOM's position encoding and of its norm after the embedding, with a learning-rate search for each arm."""

from effscale.experiments.bloom_ablations.config import PRESETS, Config
from effscale.experiments.bloom_ablations.experiment import main, run

__all__ = ["PRESETS", "Config", "main", "run"]
