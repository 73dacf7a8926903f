"""A conversation with a model in the terminal or on a web page."""

from effscale.experiments.chat.config import PRESETS, Config
from effscale.experiments.chat.terminal import main

__all__ = ["PRESETS", "Config", "main"]
