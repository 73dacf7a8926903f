"""The stages of random-LTD and of the sequence-length curriculum over a whole training, and the shares of the rounds of 1-bit optimizers."""

import dataclasses
from collections.abc import Sequence

from effscale.data_efficiency import DataEfficiencyConfig, Plan, make_plan
from effscale.plan.cases import Case, Technique

PAPER = DataEfficiencyConfig(
    curriculum=110_000 / 286_102,
    min_length=80,
    dropping=200_000 / 286_102,
    min_kept=128,
    granularity=128,
)
"""The schedule of the Data Efficiency paper's GPT-3 1.3B. Its lengths grow by 8 and its kept tokens by 16. Each value is a separate program,
so here both grow by 128."""

# Fractions of a training's steps, from BERT-Large in the papers of 1-bit Adam, 1-bit LAMB and 0/1 Adam.
WARM_UP = {"onebit_adam": 23 / 152, "onebit_lamb": 1000 / 5993}
VARIANCE, LOCAL_STEPS, LONGEST = 12.5 / 152, 32.678 / 152, 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """The stages of a technique on whole rows of some length.

    Attributes:
        plan: The stages, each with a length and the number of kept tokens.
        steps: Number of steps of a training without the technique.
    """

    plan: Plan
    steps: int

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Lengths and kept tokens in order of training; the last is the whole row."""
        return self.plan.stages.values

    def chosen(self, points: int) -> list[tuple[int, int]]:
        """Return ``points`` of the shapes before the last, evenly spaced, starting with the first."""
        partly = self.shapes[:-1]
        count = min(points, len(partly))
        return [partly[number * len(partly) // count] for number in range(count)]

    def shares(self) -> list[float]:
        """Return for each shape its share of the steps, relative to a training without the technique."""
        ends = (*self.plan.stages.starts[1:], self.steps)
        return [
            max(0, min(end, self.steps) - start) / self.steps
            for start, end in zip(self.plan.stages.starts, ends, strict=True)
        ]


def stages_of(
    case: Case, technique: Technique, efficiency: DataEfficiencyConfig, steps: int
) -> Schedule:
    """Return the stages of ``random_ltd`` or ``curriculum`` for the step of a case without the technique.

    Raises:
        ValueError: The schedule does not match the model or the length.
    """
    plan = make_plan(
        "ltd" if technique == "random_ltd" else "cl",
        efficiency,
        case.transformer(),
        steps=steps,
        batch_size=case.batch_size,
        length=case.length,
    )
    return Schedule(plan=plan, steps=steps)


def rounds(technique: Technique, steps: int) -> Sequence[tuple[str, int, float]]:
    """Return what a 1-bit optimizer sends during training: a description, the number of its branch in the program, and the share of the
    steps.
    """
    if technique == "zero_one_adam":
        from effscale.optim import Policies, Round

        at_least_1 = lambda share: max(1, round(share * steps))
        policies = Policies(
            var_freeze_step=at_least_1(VARIANCE),
            local_step_scaler=at_least_1(LOCAL_STEPS),
            local_step_clipper=LONGEST,
        )
        kinds = policies.rounds(steps)
        share = lambda *which: float(sum((kinds == int(one)).mean() for one in which))
        return (
            ("in full", 0, share(Round.VARIANCE)),
            ("one bit", 1, share(Round.GRADIENT, Round.SYNC)),
            ("nothing", 2, share(Round.LOCAL)),
        )
    first = WARM_UP[technique]
    return (("in full", 0, first), ("one bit", 1, 1 - first))
