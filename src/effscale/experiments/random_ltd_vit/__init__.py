"""Fine-tune a pretrained ViT on images with and without random-LTD, with the same recipe and number of steps."""

from effscale.experiments.random_ltd_vit.config import PRESETS, Config
from effscale.experiments.random_ltd_vit.experiment import main, run

__all__ = ["PRESETS", "Config", "main", "run"]
