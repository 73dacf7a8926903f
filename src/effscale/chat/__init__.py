"""A conversation with a model in the terminal or on a web page."""

from effscale.chat.config import Config
from effscale.chat.terminal import main

__all__ = ["Config", "main"]
