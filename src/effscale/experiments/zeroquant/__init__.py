"""Trained models in 8 and 4 bits: what rounding costs, and what LKD and GPTQ give back."""

from effscale.experiments.zeroquant.config import PRESETS, Config
from effscale.experiments.zeroquant.experiment import main, run

__all__ = ["PRESETS", "Config", "main", "run"]
