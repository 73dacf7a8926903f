"""A trained ViT is fine-tuned on images with and without random-LTD, by one recipe, in equally many steps."""

from effscale.experiments.random_ltd_vit.config import PRESETS, Config
from effscale.experiments.random_ltd_vit.experiment import main, run

__all__ = ["PRESETS", "Config", "main", "run"]
