"""What data-efficiency techniques make of a pretraining run: its shapes by step, its steps, and what they cost."""

import dataclasses
from typing import Any, Literal

from effscale.ltd import RandomLTD, layer_token_average, training_flops
from effscale.models import TransformerConfig
from effscale.models.validation import check
from effscale.training import LinearPacing, RootPacing, Stages, merge

Technique = Literal["none", "cl", "ltd", "cl_ltd"]
CURRICULA = ("cl", "cl_ltd")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataEfficiencyConfig:
    """The schedules of curriculum learning (cl) and random-LTD (ltd), as shares of the run without them.

    Their defaults are those of the Data Efficiency paper's GPT-3 1.3B, rounded; its start lengths of 80 and 128 are a
    twenty-fifth and a sixteenth of its 2048.
    """

    curriculum: float = 0.38
    """Share of the steps after which the curriculum is over, of rows and of their length."""
    min_percentile: int = 1
    """Percent of the rows that it begins with, those of the most frequent tokens."""
    min_length: int | None = None
    """Tokens of a row that it begins with; None takes a sixteenth."""
    dropping: float = 0.7
    """Share of the steps after which random-LTD keeps all tokens."""
    min_kept: int | None = None
    """Tokens of a row that it begins with; None takes a sixteenth."""
    granularity: int | None = None
    """Lengths and kept tokens are multiples of it, and each is a compilation; None takes an eighth of a row."""

    def __post_init__(self):
        for name in ("curriculum", "dropping"):
            check(self, 0 < getattr(self, name) <= 1, name, "above 0, at most 1")
        check(self, 1 <= self.min_percentile <= 100, "min_percentile", "from 1 to 100")
        for name in ("min_length", "min_kept", "granularity"):
            value = getattr(self, name)
            check(self, value is None or value >= 1, name, "at least 1, or None")

    def rarity(self, steps: int) -> RootPacing:
        """Percent of the rows that may be drawn, by step: the root of degree 2."""
        return RootPacing(
            min_difficulty=self.min_percentile,
            max_difficulty=100,
            total=max(1, round(self.curriculum * steps)),
            difficulty_step=1,
        )

    def lengths(self, steps: int, length: int) -> LinearPacing:
        """Tokens of a row that are trained on, by step."""
        return self._line("min_length", self.curriculum, steps, length)

    def kept(self, steps: int, length: int) -> LinearPacing:
        """Tokens of a row that the middle layers see, by step."""
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
    """The shapes of a run and what they cost.

    Attributes:
        model: The model's config.
        batch_size: Rows of a batch.
        length: Tokens of a row as it is read.
        stages: By step, the tokens of a row that are trained on, and how many of them dropping layers keep.
        num_steps: Steps of the run.
        curriculum: The ``effscale.curriculum.SequenceLengthCurriculum``, or None.
        ltd: What drops tokens, or None.
    """

    model: TransformerConfig
    batch_size: int
    length: int
    stages: Stages[tuple[int, int]]
    num_steps: int
    curriculum: Any
    ltd: RandomLTD | None

    def shape_batch(self, batch: Any, shape: tuple[int, int]) -> Any:
        """The batch as a stage wants it; for ``StagedStep``."""
        length, kept = shape
        if self.curriculum is not None:
            batch = self.curriculum.shape_batch(batch, length)
        return batch if self.ltd is None else self.ltd.shape_batch(batch, kept)

    def consumed(self, num_steps: int) -> dict[str, int]:
        """What the first ``num_steps`` steps take.

        Returns:
            ``tokens_read``; ``tokens_trained``, what is left of them when rows have been cut; ``layer_tokens``, the
            average over the layers of the tokens that each processes; and ``flops`` of the matrix products, forward and backward.
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
    """Tokens of a row that a layer processes on average, all layers but the first and the last keeping ``shape[1]``.

    Source: Li et al., "DeepSpeed Data Efficiency", 2022, section 3.2; rounded down as Megatron-DeepSpeed does.
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
    """The shapes and the number of steps of a run under a technique.

    Steps of shorter rows or with dropped tokens consume less, so there are more of them: the run ends when it has
    consumed as many layer-averaged tokens as ``steps`` full ones.

    Args:
        technique: What is used.
        schedules: How.
        model: The model's config.
        steps: Steps of the run without a technique. Schedules are shares of them.
        batch_size: Rows of a batch.
        length: Tokens of a row.

    Raises:
        ValueError: A schedule does not suit the model or the rows.

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
        from effscale.curriculum import SequenceLengthCurriculum

        curriculum = SequenceLengthCurriculum(pacing=schedules.lengths(steps, length))
        lengths = curriculum.stages(batch_size)
    if ltd is not None:
        kept = ltd.stages()
    # Where rows are no longer than what would be kept, nothing is dropped.
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


def check_technique(
    technique: Technique,
    schedules: DataEfficiencyConfig,
    model: TransformerConfig,
    *,
    steps: int,
    length: int,
) -> None:
    """Raises a ValueError where ``make_plan`` would, without what takes long to import: for configs, which --help makes."""
    if technique in CURRICULA:
        schedules.lengths(steps, length)
    random_ltd(technique, schedules, model, steps, length)


def random_ltd(
    technique: Technique,
    schedules: DataEfficiencyConfig,
    model: TransformerConfig,
    steps: int,
    length: int,
) -> RandomLTD | None:
    """The technique's ``RandomLTD``, checked, or None."""
    if technique not in ("ltd", "cl_ltd"):
        return None
    ltd = RandomLTD(pacing=schedules.kept(steps, length))
    ltd.check(model, length)
    return ltd
