"""Text generation with an explicit cache, sampling, and one compiled loop."""

from effscale.generation.config import SamplingConfig
from effscale.generation.decoding import Generated, decode
from effscale.generation.generating import generate
from effscale.generation.processors import (
    History,
    LogitsProcessor,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize,
)
from effscale.generation.prompts import left_pad
from effscale.generation.sampling import choose
from effscale.generation.streaming import Chunk, Stream, stream
from effscale.generation.text import AnswerText, answer_texts, stream_text

__all__ = [
    "AnswerText",
    "Chunk",
    "Generated",
    "History",
    "LogitsProcessor",
    "SamplingConfig",
    "Stream",
    "answer_texts",
    "choose",
    "decode",
    "generate",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "left_pad",
    "penalize",
    "stream",
    "stream_text",
]
