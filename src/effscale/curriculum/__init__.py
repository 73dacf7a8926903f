"""Curriculum learning: the order of samples, the sequence length, and measures of training stability.

References:
    Li et al., "DeepSpeed Data Efficiency" (2022). https://arxiv.org/abs/2212.03597
    Li et al., "The Stability-Efficiency Dilemma" (2021), sequence-length warmup. https://arxiv.org/abs/2108.06084
"""

from typing import TYPE_CHECKING

from effscale.lazy import lazy_package

if TYPE_CHECKING:
    from effscale.curriculum.analysis.analyze import (
        AnalysisProgress,
        accumulate,
        analyze,
        count_vocabulary,
    )
    from effscale.curriculum.digests import fingerprint
    from effscale.curriculum.index import CorruptIndexError, DifficultyIndex
    from effscale.curriculum.instability import (
        LossRatioWriter,
        loss_ratio,
        unstable_steps,
        variance_metrics,
        with_metrics,
    )
    from effscale.curriculum.learning_rate import current_learning_rate, steps_then_tokens
    from effscale.curriculum.lengths import (
        SequenceLengthCurriculum,
        reshape,
        reshaped_rows,
        truncate,
        truncate_padded,
    )
    from effscale.curriculum.metrics import (
        LengthThenRarity,
        TokenCounts,
        VocabularyRarity,
        sequence_length,
    )
    from effscale.curriculum.pools import Difficulty
    from effscale.curriculum.ranking import Ranking, rank
    from effscale.curriculum.sampler import curriculum_rows

__all__ = [
    "AnalysisProgress",
    "CorruptIndexError",
    "Difficulty",
    "DifficultyIndex",
    "LengthThenRarity",
    "LossRatioWriter",
    "Ranking",
    "SequenceLengthCurriculum",
    "TokenCounts",
    "VocabularyRarity",
    "accumulate",
    "analyze",
    "count_vocabulary",
    "current_learning_rate",
    "curriculum_rows",
    "fingerprint",
    "loss_ratio",
    "rank",
    "reshape",
    "reshaped_rows",
    "sequence_length",
    "steps_then_tokens",
    "truncate",
    "truncate_padded",
    "unstable_steps",
    "variance_metrics",
    "with_metrics",
]

lazy_package(__name__)
