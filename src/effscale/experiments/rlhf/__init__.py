"""Supervised fine-tuning, a reward model and reinforcement learning, in one command."""

from effscale.experiments.rlhf.config import PRESETS, Config
from effscale.experiments.rlhf.experiment import main, run

__all__ = ["PRESETS", "Config", "main", "run"]
