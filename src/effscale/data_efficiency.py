r"""Curriculum learning and random-LTD together, on a budget of layer-averaged tokens: the Data Efficiency paper.

A step with short rows or dropped tokens costs less than a full one. A run with a technique therefore takes more steps,
until it has consumed the same number of layer-averaged tokens as the run without it. The learning rate follows them.

References:
    Li et al., "DeepSpeed Data Efficiency: Improving Deep Learning Model Quality and Training Efficiency via Efficient
        Data Sampling and Routing" (2022). https://arxiv.org/abs/2212.03597
"""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from effscale.curriculum import SequenceLengthCurriculum, VocabularyRarity
from effscale.curriculum.ranking import Ranking, rank
from effscale.ltd import RandomLTD, layer_token_average, training_flops
from effscale.models import TransformerConfig
from effscale.options import Bounds, Options, PositiveInt, check
from effscale.run import Run
from effscale.training import LinearPacing, RootPacing, Stages, merge
from effscale.training.staged import Changes
from effscale.training.step import count_tokens

if TYPE_CHECKING:
    from effscale.data import PackedTokens

Technique = Literal["none", "cl", "ltd", "cl_ltd"]
CURRICULA = ("cl", "cl_ltd")
Share = Annotated[float, Bounds(above=0, at_most=1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataEfficiencyConfig(Options):
    """Schedules of curriculum learning (cl) and random-LTD (ltd), as fractions of the run without them.

    The defaults are those of the Data Efficiency paper's GPT-3 1.3B, rounded; its initial lengths of 80 and 128 are
    1/25 and 1/16 of its 2048.
    """

    curriculum: Share = 0.38
    """Fraction of the steps after which the curriculum ends, both that of rows and that of their length."""
    min_percentile: Annotated[int, Bounds(at_least=1, at_most=100)] = 1
    """Percentage of the rows at the start of the curriculum: those with the most frequent tokens."""
    min_length: PositiveInt | None = None
    """Sequence length at the start of the curriculum; None uses a sixteenth of a row."""
    dropping: Share = 0.7
    """Fraction of the steps after which random-LTD keeps all tokens."""
    min_kept: PositiveInt | None = None
    """Number of tokens that random-LTD keeps at the start; None uses a sixteenth of a row."""
    granularity: PositiveInt | None = None
    """Lengths and kept tokens are multiples of this, and each one costs a compilation; None uses an eighth of a row."""

    def rarity(self, steps: int) -> RootPacing:
        """Return the percentage of the rows to draw from, by step: a square-root schedule."""
        return RootPacing(
            min_difficulty=self.min_percentile,
            max_difficulty=100,
            total=max(1, round(self.curriculum * steps)),
            difficulty_step=1,
        )

    def lengths(self, steps: int, length: int) -> LinearPacing:
        """Return the sequence length, by step."""
        return self._line("min_length", self.curriculum, steps, length)

    def kept(self, steps: int, length: int) -> LinearPacing:
        """Return the number of tokens per row that the middle layers process, by step."""
        return self._line("min_kept", self.dropping, steps, length)

    def _line(self, field: str, share: float, steps: int, length: int) -> LinearPacing:
        first = getattr(self, field)
        first = max(1, length // 16) if first is None else first
        check(self, first <= length, field, f"at most the length of a row, {length}")
        step = self.granularity
        step = max(1, length // 8) if step is None else step
        check(self, step <= length, "granularity", f"at most the length of a row, {length}")
        return LinearPacing(
            min_difficulty=first,
            max_difficulty=length,
            total=max(1, round(share * steps)),
            difficulty_step=step,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The shapes of a run and their cost.

    Attributes:
        model: The model's config.
        batch_size: Rows per batch.
        length: Tokens per row as read.
        stages: The sequence length and the number of tokens that dropping layers keep, by step.
        num_steps: Number of steps of the run.
        curriculum: The ``effscale.curriculum.SequenceLengthCurriculum``, or None.
        ltd: The ``effscale.ltd.RandomLTD``, or None.
    """

    model: TransformerConfig
    batch_size: int
    length: int
    stages: Stages[tuple[int, int]]
    num_steps: int
    curriculum: Any
    ltd: RandomLTD | None

    def applied_to(self, run: Run) -> Run:
        """Return a run with the techniques of the plan: its model, its number of steps, its shapes and, with random-LTD, its loss.

        With random-LTD, a step counts the tokens that a layer processes on average. A learning rate by tokens follows
        them.
        """
        ltd = self.ltd
        return dataclasses.replace(
            run,
            model=self.model,
            num_steps=self.num_steps,
            loss=run.loss if ltd is None else ltd.loss(run.loss),
            tokens_per_batch=count_tokens if ltd is None else ltd.tokens_per_batch(self.model),
            changes=Changes(self.stages, self.shape_batch),
        )

    def shape_batch(self, batch: Any, shape: tuple[int, int]) -> Any:
        """Return the batch in the shape of a stage, for ``StagedStep``."""
        length, kept = shape
        if self.curriculum is not None:
            batch = self.curriculum.shape_batch(batch, length)
        return batch if self.ltd is None else self.ltd.shape_batch(batch, kept)

    def consumed(self, num_steps: int) -> dict[str, int]:
        """Return what the first ``num_steps`` steps consume.

        Returns:
            ``tokens_read``; ``tokens_trained``, those left after truncating rows; ``layer_tokens``, the average over
            the layers of the tokens that each processes; and ``flops`` of the matrix products, forward and backward.
        """
        costs = {
            "tokens_read": lambda shape: self.length,
            "tokens_trained": lambda shape: shape[0],
            "layer_tokens": lambda shape: layer_tokens(self.model, shape),
            "flops": lambda shape: training_flops(
                self.model, *(shape if shape[1] < shape[0] else shape[:1])
            ),
        }
        return {
            name: self.batch_size * self.stages.total(num_steps, cost)
            for name, cost in costs.items()
        }


def layer_tokens(model: TransformerConfig, shape: tuple[int, int]) -> int:
    """Return the tokens per row that a layer processes on average, if all layers except the first and the last keep
    ``shape[1]``.

    The result is rounded down, as in Megatron-DeepSpeed.

    References:
        Li et al., "DeepSpeed Data Efficiency: Improving Deep Learning Model Quality and Training Efficiency via
            Efficient Data Sampling and Routing" (2022), section 3.2. https://arxiv.org/abs/2212.03597
    """
    return layer_token_average(*shape, model.num_layers, max(0, model.num_layers - 2))


def make_plan(
    technique: Technique,
    schedules: DataEfficiencyConfig,
    model: TransformerConfig,
    *,
    steps: int,
    batch_size: int,
    length: int,
) -> Plan:
    """Plan the shapes and the number of steps of a run with a technique.

    Steps with shorter rows or dropped tokens consume less, so there are more of them: the run ends when it has
    consumed the same number of layer-averaged tokens as ``steps`` full steps.

    Args:
        technique: The technique.
        schedules: Its schedules.
        model: The model's config.
        steps: Number of steps of the run without a technique. Schedules are fractions of it.
        batch_size: Rows per batch.
        length: Tokens per row.

    Raises:
        ValueError: A schedule does not match the model or the rows.

    Example:
        >>> from effscale.models import gpt2
        >>> model = gpt2(num_layers=4, d_model=16, num_heads=2, vocab_size=50, max_length=64)
        >>> plan = make_plan("ltd", DataEfficiencyConfig(min_kept=32, granularity=32), model,
        ...     steps=100, batch_size=8, length=64)
        >>> plan.stages, plan.num_steps  # while half of the layers keep half of the tokens, a batch counts for 3/4
        (Stages(starts=(0, 70), values=((64, 32), (64, 64))), 118)
    """
    curriculum, ltd = None, random_ltd(technique, schedules, model, steps, length)
    lengths = kept = Stages((0,), (length,))
    if technique in CURRICULA:
        curriculum = SequenceLengthCurriculum(pacing=schedules.lengths(steps, length))
        lengths = curriculum.stages(batch_size)
    if ltd is not None:
        kept = ltd.stages()
    # If rows are no longer than the number of kept tokens, nothing is dropped.
    stages = merge(lengths, kept).map(lambda shape: (shape[0], min(shape)))
    num_steps = stages.steps_until(steps * length, lambda shape: layer_tokens(model, shape))
    return Plan(
        model=model,
        batch_size=batch_size,
        length=length,
        stages=stages,
        num_steps=num_steps,
        curriculum=curriculum,
        ltd=ltd,
    )


def random_ltd(
    technique: Technique,
    schedules: DataEfficiencyConfig,
    model: TransformerConfig,
    steps: int,
    length: int,
) -> RandomLTD | None:
    """Return the technique's ``RandomLTD``, checked, or None."""
    if technique not in ("ltd", "cl_ltd"):
        return None
    ltd = RandomLTD(pacing=schedules.kept(steps, length))
    ltd.check(model, length)
    return ltd


def rank_by_rarity(rows: "PackedTokens") -> Ranking:
    """Rank rows from frequent to rare tokens.

    This is one pass over the corpus in memory, and takes seconds for tens of millions of tokens; for larger corpora,
    use ``effscale.curriculum.analyze``.
    """
    from effscale.curriculum.analysis.rows import read_rows  # imports grain, which is slow
    from effscale.data.statistics import token_counts

    metric = VocabularyRarity(token_counts(rows.store))
    starts = range(0, len(rows), 1024)
    blocks = [read_rows(rows, start, min(start + 1024, len(rows))) for start in starts]
    return rank(np.concatenate([metric(block) for block in blocks]))
