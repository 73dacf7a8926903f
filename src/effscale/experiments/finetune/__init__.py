"""Trained models of texts and of images are fine-tuned here and in PyTorch, by one recipe."""

from effscale.experiments.finetune.config import PRESETS, Config
from effscale.experiments.finetune.experiment import main, run

__all__ = ["PRESETS", "Config", "main", "run"]
