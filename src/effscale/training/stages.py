"""Stages: the steps of a training run during which a schedule keeps its value.

Schedules change shapes, and shapes are static. So three things about a schedule matter: the steps at which it changes, its
values, and the cost of a run. All three follow from the list of stages.
"""

import bisect
import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from effscale.training.pacing import Pacing

T = TypeVar("T")
S = TypeVar("S")


@dataclasses.dataclass(frozen=True)
class Stages(Generic[T]):
    """A piecewise constant function of the training step; the last stage has no end.

    Attributes:
        starts: The first step of each stage; the first is 0.
        values: The value in each stage.

    >>> lengths = Stages((0, 100, 250), (64, 128, 256))
    >>> [lengths(step) for step in (0, 99, 100, 1000)]
    [64, 64, 128, 256]
    >>> lengths.total(200, cost=lambda length: 8 * length)  # tokens of the first 200 steps
    153600
    >>> lengths.steps_until(1_000_000, cost=lambda length: 8 * length)
    639
    """

    starts: tuple[int, ...]
    values: tuple[T, ...]

    def __post_init__(self):
        if len(self.starts) != len(self.values) or not self.starts or self.starts[0] != 0:
            raise ValueError(
                f"starts must begin with 0 and have one step for each of {len(self.values)} values, got {self.starts}"
            )
        if list(self.starts) != sorted(set(self.starts)):
            raise ValueError(f"starts must be increasing, got {self.starts}")

    def index(self, step: int) -> int:
        """Return the index of the stage that contains ``step``."""
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        return bisect.bisect_right(self.starts, step) - 1

    def __call__(self, step: int) -> T:
        """Return the value at ``step``."""
        return self.values[self.index(step)]

    def total(self, num_steps: int, cost: Callable[[T], int]) -> int:
        """Return the total cost of the first ``num_steps`` steps, each of which costs ``cost(value)``."""
        ends = (*self.starts[1:], num_steps)
        return sum(
            max(0, min(end, num_steps) - start) * cost(value)
            for start, end, value in zip(self.starts, ends, self.values, strict=True)
        )

    def steps_until(self, amount: int, cost: Callable[[T], int]) -> int:
        """Return the minimum number of steps whose total cost is at least ``amount``, for instance to stop a run by tokens consumed.

        Raises:
            ValueError: The last stage costs nothing, and the earlier stages cost less than ``amount``.
        """
        spent = 0
        for start, end, value in zip(
            self.starts, (*self.starts[1:], None), self.values, strict=True
        ):
            missing, each = amount - spent, cost(value)
            if missing <= 0:
                return start
            steps = -(-missing // each) if each > 0 else None
            if steps is not None and (end is None or steps <= end - start):
                return start + steps
            if end is None:
                break
            spent += (end - start) * each
        raise ValueError(
            f"amount must be reachable, got {amount}, but the last stage costs nothing"
        )

    def map(self, function: Callable[[T], S]) -> "Stages[S]":
        """Apply a function to the values; neighboring stages that become equal are merged."""
        return _joined(self.starts, tuple(function(value) for value in self.values))


def stages(
    pacing: Pacing, *, offset: int = 1, cost: Callable[[int], int] | None = None
) -> Stages[int]:
    """Return the stages of a pacing function.

    Args:
        pacing: The function.
        offset: With steps as the clock, step ``b`` (from 0) takes the value at ``b + offset``. As in DeepSpeed, curricula
            count from 1 and random-LTD from 0.
        cost: With samples or tokens as the clock, the number of them that a step at a given difficulty consumes. Step ``b``
            takes the value at what the steps before it consumed.

    Returns:
        The difficulty by step.

    Raises:
        ValueError: The clock counts samples or tokens, and ``cost`` is not given or not positive.

    >>> from effscale.training import LinearPacing
    >>> by_steps = LinearPacing(min_difficulty=64, max_difficulty=256, total=30, difficulty_step=64)
    >>> stages(by_steps)
    Stages(starts=(0, 9, 19, 29), values=(64, 128, 192, 256))
    >>> by_tokens = LinearPacing(
    ...     min_difficulty=64, max_difficulty=256, total=6000, difficulty_step=64, clock="tokens")
    >>> stages(by_tokens, cost=lambda length: 2 * length)
    Stages(starts=(0, 16, 24, 29), values=(64, 128, 192, 256))
    """
    if pacing.clock == "steps":
        starts: dict[int, int] = {}
        for level in pacing.levels:
            starts[max(0, pacing.first(level) - offset)] = (
                level  # of the stages that start at step 0, the last
            )
        return Stages(tuple(starts), tuple(starts.values()))
    if cost is None:
        raise ValueError(
            f"clock={pacing.clock!r} needs cost, a function from a difficulty to the {pacing.clock} that a step consumes"
        )
    begun, values, step, consumed = [0], [pacing(0)], 0, 0
    last = pacing(pacing.end)
    while values[-1] < last:
        each = cost(values[-1])
        if each < 1:
            raise ValueError(f"cost must be at least 1, got {each} at difficulty {values[-1]}")
        steps = -(-(pacing.first(values[-1] + 1) - consumed) // each)
        step, consumed = step + steps, consumed + steps * each
        begun.append(step)
        values.append(pacing(consumed))
    return Stages(tuple(begun), tuple(values))


def merge(*parts: Stages[Any]) -> Stages[tuple[Any, ...]]:
    """Merge several schedules into one whose value is the tuple of their values.

    >>> merge(Stages((0, 10), (64, 128)), Stages((0, 5), (32, 48)))
    Stages(starts=(0, 5, 10), values=((64, 32), (64, 48), (128, 48)))
    """
    starts = sorted({0} | {start for part in parts for start in part.starts})
    return _joined(tuple(starts), tuple(tuple(part(step) for part in parts) for step in starts))


def _joined(starts: tuple[int, ...], values: tuple[Any, ...]) -> Stages[Any]:
    kept = [i for i in range(len(values)) if i == 0 or values[i] != values[i - 1]]
    return Stages(tuple(starts[i] for i in kept), tuple(values[i] for i in kept))
