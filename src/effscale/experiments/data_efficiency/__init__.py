"""Pretrain a GPT with less data: curriculum learning, random-LTD and both, compared with the baseline."""

from effscale.experiments.data_efficiency.config import PRESETS, Config
from effscale.experiments.data_efficiency.experiment import main, run

__all__ = ["PRESETS", "Config", "main", "run"]
