"""The steps of RLHF in one command: supervised fine-tuning, a reward model and reinforcement learning."""

from effscale.experiments.rlhf.config import PRESETS, Config
from effscale.experiments.rlhf.experiment import main, run

__all__ = ["PRESETS", "Config", "main", "run"]
