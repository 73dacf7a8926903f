"""Evaluation of language models: log-probabilities of answers and texts, ranks of answers, programs that pass tests."""

from typing import TYPE_CHECKING

from effscale.lazy import lazy_package

if TYPE_CHECKING:
    from effscale.evaluation.continuations import score_continuations
    from effscale.evaluation.passing import pass_at_k
    from effscale.evaluation.ranking import rank_answers
    from effscale.evaluation.texts import text_log_probs

__all__ = [
    "pass_at_k",
    "rank_answers",
    "score_continuations",
    "text_log_probs",
]

lazy_package(__name__)
