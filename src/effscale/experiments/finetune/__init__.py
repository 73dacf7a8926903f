"""Fine-tune pretrained text and image models in JAX and in PyTorch with the same recipe."""

from effscale.experiments.finetune.config import PRESETS, Config
from effscale.experiments.finetune.experiment import main, run

__all__ = ["PRESETS", "Config", "main", "run"]
