"""What BLOOM's positions and its norm after the embedding are worth, each arm with a search of its own rate."""

from effscale.experiments.bloom_ablations.config import PRESETS, Config
from effscale.experiments.bloom_ablations.experiment import main, run

__all__ = ["PRESETS", "Config", "main", "run"]
