"""Text from a trained model: an explicit cache, sampling, one compiled loop."""

from effscale.generation.decoding import Generated, decode
from effscale.generation.generating import generate
from effscale.generation.prompts import left_pad
from effscale.generation.sampling import SamplingConfig, choose, keep_top_k, keep_top_p, penalize

__all__ = [
    "Generated",
    "SamplingConfig",
    "choose",
    "decode",
    "generate",
    "keep_top_k",
    "keep_top_p",
    "left_pad",
    "penalize",
]
