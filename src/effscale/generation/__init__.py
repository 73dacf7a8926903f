"""Text generation with an explicit cache, sampling, and one compiled loop."""

from typing import TYPE_CHECKING

from effscale.lazy import lazy_package

if TYPE_CHECKING:
    from effscale.generation.config import SamplingConfig
    from effscale.generation.decoding import decode
    from effscale.generation.generating import generate
    from effscale.generation.prompts import left_pad
    from effscale.generation.streaming import stream
    from effscale.generation.text import answer_texts, stream_text

__all__ = [
    "SamplingConfig",
    "answer_texts",
    "decode",
    "generate",
    "left_pad",
    "stream",
    "stream_text",
]

lazy_package(__name__)
