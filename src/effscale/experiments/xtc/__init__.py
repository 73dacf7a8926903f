"""A fine-tuned BERT loses half of its layers, then nearly all of its bits: XTC."""

from effscale.experiments.xtc.config import PRESETS, Config
from effscale.experiments.xtc.experiment import main, run

__all__ = ["PRESETS", "Config", "main", "run"]
