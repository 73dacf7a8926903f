"""XTC: distill a fine-tuned BERT into half of its layers, then quantize it to two bits and one bit."""

from effscale.experiments.xtc.config import PRESETS, Config
from effscale.experiments.xtc.experiment import main, run

__all__ = ["PRESETS", "Config", "main", "run"]
