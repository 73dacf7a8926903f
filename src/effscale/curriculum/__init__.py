"""Curriculum learning: the order of samples, the sequence length, and measures of training stability.

References:
    Li et al., "DeepSpeed Data Efficiency" (2022). https://arxiv.org/abs/2212.03597
    Li et al., "The Stability-Efficiency Dilemma" (2021), sequence-length warmup. https://arxiv.org/abs/2108.06084
"""

from typing import TYPE_CHECKING

from effscale.lazy import lazy_package

if TYPE_CHECKING:
    from effscale.curriculum.analysis.analyze import analyze, count_vocabulary
    from effscale.curriculum.instability import (
        LossRatioWriter,
        loss_ratio,
        unstable_steps,
        variance_metrics,
        with_metrics,
    )
    from effscale.curriculum.learning_rate import current_learning_rate, steps_then_tokens
    from effscale.curriculum.lengths import SequenceLengthCurriculum, reshape, truncate_padded
    from effscale.curriculum.metrics import LengthThenRarity, VocabularyRarity, sequence_length
    from effscale.curriculum.pools import Difficulty
    from effscale.curriculum.sampler import curriculum_rows

__all__ = [
    "Difficulty",
    "LengthThenRarity",
    "LossRatioWriter",
    "SequenceLengthCurriculum",
    "VocabularyRarity",
    "analyze",
    "count_vocabulary",
    "current_learning_rate",
    "curriculum_rows",
    "loss_ratio",
    "reshape",
    "sequence_length",
    "steps_then_tokens",
    "truncate_padded",
    "unstable_steps",
    "variance_metrics",
    "with_metrics",
]

lazy_package(__name__)
