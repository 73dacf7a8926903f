"""Curriculum learning: which samples are drawn when, how long rows are, and whether a run is stable.

The parts are those of "DeepSpeed Data Efficiency" (arXiv 2212.03597) and of sequence-length warmup (arXiv 2108.06084).
"""

from typing import TYPE_CHECKING

from effscale.curriculum.analysis import AnalysisProgress, accumulate, analyze, count_vocabulary
from effscale.curriculum.deepspeed import (
    DeepSpeedCurriculum,
    curriculum_from_deepspeed,
    pacing_from_deepspeed,
)
from effscale.curriculum.deepspeed_index import metric_from_deepspeed, ranking_from_deepspeed
from effscale.curriculum.fingerprint import fingerprint
from effscale.curriculum.index import CorruptIndexError, DifficultyIndex
from effscale.curriculum.instability import (
    LossRatioWriter,
    loss_ratio,
    unstable_steps,
    variance_metrics,
    with_metrics,
)
from effscale.curriculum.learning_rate import current_learning_rate, steps_then_tokens
from effscale.curriculum.metrics import (
    LengthThenRarity,
    TokenCounts,
    VocabularyRarity,
    sequence_length,
)
from effscale.curriculum.pools import Difficulty
from effscale.curriculum.ranking import Ranking, rank
from effscale.curriculum.reference_loss import ReferenceLoss
from effscale.curriculum.sequence_length import (
    SequenceLengthCurriculum,
    reshape,
    reshaped_rows,
    truncate,
    truncate_padded,
)

if TYPE_CHECKING:
    from effscale.curriculum.loss_driven import LossDrivenBatches
    from effscale.curriculum.sampler import curriculum_rows

__all__ = [
    "AnalysisProgress",
    "CorruptIndexError",
    "DeepSpeedCurriculum",
    "Difficulty",
    "DifficultyIndex",
    "LengthThenRarity",
    "LossDrivenBatches",
    "LossRatioWriter",
    "Ranking",
    "ReferenceLoss",
    "SequenceLengthCurriculum",
    "TokenCounts",
    "VocabularyRarity",
    "accumulate",
    "analyze",
    "count_vocabulary",
    "current_learning_rate",
    "curriculum_from_deepspeed",
    "curriculum_rows",
    "fingerprint",
    "loss_ratio",
    "metric_from_deepspeed",
    "pacing_from_deepspeed",
    "rank",
    "ranking_from_deepspeed",
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

# grain takes most of a second to import, and only these need it.
_NEEDS_GRAIN = {"LossDrivenBatches": "loss_driven", "curriculum_rows": "sampler"}


def __getattr__(name: str):
    if name in _NEEDS_GRAIN:
        import importlib

        return getattr(importlib.import_module(f"{__name__}.{_NEEDS_GRAIN[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
