"""Stages: the stretches of a training run in which a schedule keeps its value.

Schedules change shapes, and shapes are static. So what matters of a schedule is at which steps it changes, what its
values are, and what a run costs under it; all three follow from the list of stages.
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
    """A value for each training step, constant over stretches; the last stretch has no end.

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
            raise ValueError(f"starts must rise, got {self.starts}")

    def index(self, step: int) -> int:
        """Return the number of the stage that ``step`` lies in."""
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        return bisect.bisect_right(self.starts, step) - 1

    def __call__(self, step: int) -> T:
        """Return the value at ``step``."""
        return self.values[self.index(step)]

    def total(self, num_steps: int, cost: Callable[[T], int]) -> int:
        """What the first ``num_steps`` steps cost together, if one costs ``cost(value)``."""
        ends = (*self.starts[1:], num_steps)
        return sum(
            max(0, min(end, num_steps) - start) * cost(value)
            for start, end, value in zip(self.starts, ends, self.values, strict=True)
        )

    def steps_until(self, amount: int, cost: Callable[[T], int]) -> int:
        """Return the fewest steps that cost ``amount`` or more together: the length of a run that stops by tokens consumed.

        Raises:
            ValueError: The last stage costs nothing, and the stages before it too little.
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
        raise ValueError(f"amount={amount} is never reached: the last stage costs nothing")

    def map(self, function: Callable[[T], S]) -> "Stages[S]":
        """Return the stages of another value; neighbours that become equal are one stage."""
        return _joined(self.starts, tuple(function(value) for value in self.values))


def stages(
    pacing: Pacing, *, offset: int = 1, cost: Callable[[int], int] | None = None
) -> Stages[int]:
    """Return the stages of a pacing function.

    Args:
        pacing: The function.
        offset: With steps as the clock, step ``b`` (from 0) takes the value at ``b + offset``. Curricula count from 1
            and random-LTD from 0, as in DeepSpeed.
        cost: With samples or tokens as the clock, how many of them a step of a difficulty consumes. Step ``b`` takes
            the value at what the steps before it consumed.

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
                level  # of those begun by step 0, the last
            )
        return Stages(tuple(starts), tuple(starts.values()))
    if cost is None:
        raise ValueError(
            f"clock={pacing.clock!r} needs cost, the {pacing.clock} that a step of a difficulty consumes"
        )
    begun, values, step, consumed = [0], [pacing(0)], 0, 0
    last = pacing(pacing.end)
    while values[-1] < last:
        each = cost(values[-1])
        if each < 1:
            raise ValueError(f"cost is {each} at difficulty {values[-1]}; it must be at least 1")
        steps = -(-(pacing.first(values[-1] + 1) - consumed) // each)
        step, consumed = step + steps, consumed + steps * each
        begun.append(step)
        values.append(pacing(consumed))
    return Stages(tuple(begun), tuple(values))


def merge(*parts: Stages[Any]) -> Stages[tuple[Any, ...]]:
    """Several schedules as one, whose value is the tuple of theirs.

    >>> merge(Stages((0, 10), (64, 128)), Stages((0, 5), (32, 48)))
    Stages(starts=(0, 5, 10), values=((64, 32), (64, 48), (128, 48)))
    """
    starts = sorted({0} | {start for part in parts for start in part.starts})
    return _joined(tuple(starts), tuple(tuple(part(step) for part in parts) for step in starts))


def _joined(starts: tuple[int, ...], values: tuple[Any, ...]) -> Stages[Any]:
    kept = [i for i in range(len(values)) if i == 0 or values[i] != values[i - 1]]
    return Stages(tuple(starts[i] for i in kept), tuple(values[i] for i in kept))
