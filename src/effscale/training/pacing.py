"""Pacing functions: the difficulty or length of samples as a function of training progress.

They are those of the Data Efficiency paper, and include the schedule of random-LTD. A pacing function never decreases, so
it takes few values in a known order: the buckets for which a training step is compiled.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Annotated, Literal

from effscale.options import Bounds, NonNegativeInt, Options, PositiveInt, check

Clock = Literal["steps", "samples", "tokens"]
"""What a pacing function counts."""
NUM_LEVELS = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pacing(Options):
    """The base class of pacing functions; use one of its subclasses.

    ``pacing(t)`` is the difficulty at count ``t``. The clock decides what ``t`` counts: training steps, or the samples or tokens
    consumed before a step.
    """

    clock: Clock = "steps"
    """What to count: ``steps``, ``samples`` or ``tokens``."""

    def __call__(self, t: int) -> int:
        """Return the difficulty at count ``t``, which is 0 or more."""
        raise NotImplementedError

    @property
    def end(self) -> int:
        """The count at which the maximum difficulty is reached."""
        raise NotImplementedError

    def first(self, level: int) -> int:
        """Return the smallest count at which the difficulty is ``level`` or more.

        Raises:
            ValueError: The difficulty never reaches ``level``.
        """
        low, high = 0, self.end
        if level > self(high):
            raise ValueError(
                f"level must be at most the maximum difficulty {self(high)}, got {level}"
            )
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self(middle) >= level else (middle + 1, high)
        return low

    @property
    def levels(self) -> tuple[int, ...]:
        """The difficulties the function takes, in ascending order."""
        return tuple(self._levels())

    def _levels(self) -> Iterator[int]:
        level, last = self(0), self(self.end)
        yield level
        while level < last:
            level = self(self.first(level + 1))
            yield level


@dataclasses.dataclass(frozen=True, kw_only=True)
class RootPacing(Pacing):
    r"""Root pacing: from the minimum to the maximum difficulty along a root of the count.

    $$d(t) = \left\lfloor (t/T)^{1/k} (d_1 - d_0) + d_0 \right\rfloor_g$$

    rounded down to a multiple of the granularity $g$, but never below $d_0$, and exactly $d_1$ from
    $t = T$ on. In the original, rounding can fall below $d_0$, and a $d_1$ that is not a multiple of
    $g$ is reached only after $T$; elsewhere both agree.

    References:
        Li et al., "DeepSpeed Data Efficiency" (2022), section 3.1. https://arxiv.org/abs/2212.03597

    >>> pacing = RootPacing(min_difficulty=1, max_difficulty=100, total=110_000, difficulty_step=1)
    >>> [pacing(t) for t in (11, 12, 100, 27_500, 110_000)]
    [1, 2, 3, 50, 100]
    """

    min_difficulty: NonNegativeInt
    """The initial difficulty."""
    max_difficulty: NonNegativeInt
    """The final difficulty."""
    total: PositiveInt
    """The count at which the final difficulty is reached, ``total_curriculum_step`` in DeepSpeed."""
    difficulty_step: PositiveInt | None = None
    """The granularity. If the difficulty is a length, each level is one shape to compile, and None makes at most about a
    dozen. If it is a percentile or a value, nothing is compiled, and 1 is fine."""
    root_degree: PositiveInt = 2
    """The degree of the root. 1 is linear; with a greater degree the difficulty rises faster at first."""

    def __post_init__(self):
        super().__post_init__()
        wanted = f"at least min_difficulty={self.min_difficulty}"
        check(self, self.max_difficulty >= self.min_difficulty, "max_difficulty", wanted)

    @property
    def end(self) -> int:
        """The count at which the maximum difficulty is reached."""
        return self.total

    @property
    def granularity(self) -> int:
        """``difficulty_step``, or by default a value that makes about a dozen levels, rounded to a multiple of 8 above 8."""
        if self.difficulty_step is not None:
            return self.difficulty_step
        step = max(1, math.ceil((self.max_difficulty - self.min_difficulty) / NUM_LEVELS))
        return step if step <= 8 else math.ceil(step / 8) * 8

    def __call__(self, t: int) -> int:
        """Return the difficulty at count ``t``."""
        if t >= self.total:
            return self.max_difficulty
        share = (t / self.total) ** (1 / self.root_degree)
        value = math.floor(
            share * (self.max_difficulty - self.min_difficulty) + self.min_difficulty
        )
        value -= value % self.granularity
        return min(max(value, self.min_difficulty), self.max_difficulty)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearPacing(RootPacing):
    """Linear pacing: ``RootPacing`` of degree 1.

    >>> pacing = LinearPacing(min_difficulty=2, max_difficulty=10, total=8, difficulty_step=2)
    >>> [pacing(t) for t in range(1, 11)]
    [2, 4, 4, 6, 6, 8, 8, 10, 10, 10]
    """

    root_degree: int = dataclasses.field(default=1, init=False)
    """Always 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscretePacing(Pacing):
    """Discrete pacing: given difficulties up to given counts.

    >>> pacing = DiscretePacing(difficulty=(1, 2, 3), max_step=(5, 10))
    >>> [pacing(t) for t in (1, 5, 6, 10, 11)]
    [1, 1, 2, 2, 3]
    """

    difficulty: Annotated[tuple[NonNegativeInt, ...], Bounds(at_least=1)]
    """The difficulties, in ascending order."""
    max_step: tuple[NonNegativeInt, ...]
    """The last count of each difficulty except the last."""

    def __post_init__(self):
        super().__post_init__()
        rising = lambda numbers: list(numbers) == sorted(set(numbers))
        check(self, rising(self.difficulty), "difficulty", "increasing numbers")
        wanted = f"one number for each difficulty except the last, {len(self.difficulty) - 1}"
        check(self, len(self.max_step) == len(self.difficulty) - 1, "max_step", wanted)
        check(self, rising(self.max_step), "max_step", "increasing numbers")

    @property
    def min_difficulty(self) -> int:
        """The initial difficulty."""
        return self.difficulty[0]

    @property
    def max_difficulty(self) -> int:
        """The final difficulty."""
        return self.difficulty[-1]

    @property
    def end(self) -> int:
        """The count at which the maximum difficulty is reached."""
        return self.max_step[-1] + 1 if self.max_step else 0

    def __call__(self, t: int) -> int:
        """Return the difficulty at count ``t``."""
        return self.difficulty[sum(t > count for count in self.max_step)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CustomPacing(Pacing):
    """Custom pacing: any function that does not decrease, up to a count at which the maximum difficulty is reached.

    The function is checked at a thousand counts, as checking all counts would take too long with tokens as the clock.

    >>> pacing = CustomPacing(function=lambda t: 8 * 2 ** (t // 100), min_difficulty=8, max_difficulty=64, total=300)
    >>> [pacing(t) for t in (0, 100, 250, 300, 9_999)]
    [8, 16, 32, 64, 64]
    """

    function: Callable[[int], int]
    """The function from a count to a difficulty, in whole numbers."""
    min_difficulty: int
    """A lower bound of its values."""
    max_difficulty: int
    """The final difficulty; greater values of the function are clipped to it."""
    total: NonNegativeInt
    """The count at which the function has reached ``max_difficulty``."""

    def __post_init__(self):
        super().__post_init__()
        name = getattr(self.function, "__name__", repr(self.function))
        first, last = self.function(0), self.function(self.total)
        if first < self.min_difficulty:
            raise ValueError(
                f"function must be at least min_difficulty={self.min_difficulty}, got {name}, which is {first} at 0"
            )
        if last < self.max_difficulty:
            raise ValueError(
                f"function must reach max_difficulty={self.max_difficulty}, got {name}, which is {last} at "
                f"total={self.total}. Use a greater total or a smaller max_difficulty."
            )
        places = sorted({self.total * i // 1000 for i in range(1001)})
        values = [self.function(t) for t in places]
        for t, before, after in zip(places[1:], values[:-1], values[1:], strict=True):
            if after < before:
                raise ValueError(
                    f"function must not decrease, got {name}, which falls from {before} to {after} before count {t}"
                )

    @property
    def end(self) -> int:
        """The count at which the maximum difficulty is reached."""
        return self.total

    def __call__(self, t: int) -> int:
        """Return the difficulty at count ``t``."""
        if t >= self.total:
            return self.max_difficulty
        value = self.function(t)
        if value != int(value):
            raise ValueError(f"function must return whole numbers, got {value} at {t}")
        return min(int(value), self.max_difficulty)
