"""Pretrained models in 8 and 4 bits: the cost of rounding, and how much of it LKD and GPTQ recover."""

from effscale.experiments.zeroquant.config import PRESETS, Config
from effscale.experiments.zeroquant.experiment import main, run

__all__ = ["PRESETS", "Config", "main", "run"]
