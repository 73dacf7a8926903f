"""Pacing functions: how difficult, or how long, as a function of what was trained on.

They are those of the Data Efficiency paper, and random-LTD's schedule is one of them. A pacing function never falls, so
what it takes are few values in a known order: the buckets that a training step is compiled for.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Literal, get_args

from effscale.models.validation import check, is_finite

Clock = Literal["steps", "samples", "tokens"]
"""What a pacing function counts."""
NUM_LEVELS = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pacing:
    """What all pacing functions share; use one of the classes below.

    ``pacing(t)`` is the difficulty at count ``t``. The clock says what ``t`` counts: training steps, or the samples or tokens
    consumed before a step.
    """

    clock: Clock = "steps"
    """What is counted."""

    def __post_init__(self):
        check(self, self.clock in get_args(Clock), "clock", f"one of {', '.join(get_args(Clock))}")

    def __call__(self, t: int) -> int:
        """The difficulty at count ``t``, which is 0 or more."""
        raise NotImplementedError

    @property
    def end(self) -> int:
        """The count from which on the difficulty is the greatest."""
        raise NotImplementedError

    def first(self, level: int) -> int:
        """The smallest count at which the difficulty is ``level`` or more.

        Raises:
            ValueError: It never is.
        """
        low, high = 0, self.end
        if level > self(high):
            raise ValueError(f"level={level} is never reached; the greatest is {self(high)}")
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self(middle) >= level else (middle + 1, high)
        return low

    @property
    def levels(self) -> tuple[int, ...]:
        """The difficulties that are taken, from the smallest to the greatest."""
        return tuple(self._levels())

    def _levels(self) -> Iterator[int]:
        level, last = self(0), self(self.end)
        yield level
        while level < last:
            level = self(self.first(level + 1))
            yield level


def _check_at_least(config: Pacing, least: int, field: str, name_of_least: str = "") -> None:
    value = getattr(config, field)
    wanted = f"a finite number, at least {name_of_least}{least}"
    check(config, is_finite(value) and value >= least, field, wanted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RootPacing(Pacing):
    r"""From the smallest to the greatest difficulty along a root.

    $$d(t) = \left\lfloor (t/T)^{1/k} (d_1 - d_0) + d_0 \right\rfloor_g$$

    rounded down to a multiple of the granularity $g$, but never below $d_0$, and exactly $d_1$ from
    $t = T$ on. In the original, rounding can fall below $d_0$, and a $d_1$ that is no multiple of
    $g$ is reached only after $T$; elsewhere both agree.

    Source: Li et al., "DeepSpeed Data Efficiency", 2022, section 3.1.

    >>> pacing = RootPacing(min_difficulty=1, max_difficulty=100, total=110_000, difficulty_step=1)
    >>> [pacing(t) for t in (11, 12, 100, 27_500, 110_000)]
    [1, 2, 3, 50, 100]
    """

    min_difficulty: int
    """Where it starts."""
    max_difficulty: int
    """Where it ends."""
    total: int
    """The count at which it ends, ``total_curriculum_step`` in DeepSpeed."""
    difficulty_step: int | None = None
    """Granularity. Where difficulty is a length each level is a shape to compile, and None makes about a dozen at most;
    where it is a percentile or a value nothing is compiled, and 1 is fine."""
    root_degree: int = 2
    """1 is linear; with a greater degree the difficulty rises faster at first."""

    def __post_init__(self):
        super().__post_init__()
        _check_at_least(self, 0, "min_difficulty")
        _check_at_least(self, self.min_difficulty, "max_difficulty", "min_difficulty=")
        _check_at_least(self, 1, "total")
        if self.difficulty_step is not None:
            _check_at_least(self, 1, "difficulty_step")
        _check_at_least(self, 1, "root_degree")

    @property
    def end(self) -> int:
        """The count from which on the difficulty is the greatest."""
        return self.total

    @property
    def granularity(self) -> int:
        """``difficulty_step``, or what makes about a dozen levels: a multiple of 8 where it is above 8."""
        if self.difficulty_step is not None:
            return self.difficulty_step
        step = max(1, math.ceil((self.max_difficulty - self.min_difficulty) / NUM_LEVELS))
        return step if step <= 8 else math.ceil(step / 8) * 8

    def __call__(self, t: int) -> int:
        """The difficulty at count ``t``."""
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
    """From the smallest to the greatest difficulty along a line: :class:`RootPacing` of degree 1.

    >>> pacing = LinearPacing(min_difficulty=2, max_difficulty=10, total=8, difficulty_step=2)
    >>> [pacing(t) for t in range(1, 11)]
    [2, 4, 4, 6, 6, 8, 8, 10, 10, 10]
    """

    root_degree: int = dataclasses.field(default=1, init=False)
    """Always 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscretePacing(Pacing):
    """Given difficulties up to given counts.

    >>> pacing = DiscretePacing(difficulty=(1, 2, 3), max_step=(5, 10))
    >>> [pacing(t) for t in (1, 5, 6, 10, 11)]
    [1, 1, 2, 2, 3]
    """

    difficulty: tuple[int, ...]
    """The difficulties, rising."""
    max_step: tuple[int, ...]
    """The last count of each difficulty but the last one."""

    def __post_init__(self):
        super().__post_init__()
        rising = lambda numbers: list(numbers) == sorted(set(numbers))
        check(self, len(self.difficulty) >= 1, "difficulty", "at least one number")
        check(self, rising(self.difficulty), "difficulty", "rising numbers")
        from_zero = lambda numbers: all(is_finite(number) and number >= 0 for number in numbers)
        check(self, from_zero(self.difficulty), "difficulty", "finite numbers from 0")
        wanted = f"one number for each difficulty but the last, {len(self.difficulty) - 1}"
        check(self, len(self.max_step) == len(self.difficulty) - 1, "max_step", wanted)
        check(self, rising(self.max_step), "max_step", "rising numbers")
        check(self, from_zero(self.max_step), "max_step", "finite numbers from 0")

    @property
    def min_difficulty(self) -> int:
        """Where it starts."""
        return self.difficulty[0]

    @property
    def max_difficulty(self) -> int:
        """Where it ends."""
        return self.difficulty[-1]

    @property
    def end(self) -> int:
        """The count from which on the difficulty is the greatest."""
        return self.max_step[-1] + 1 if self.max_step else 0

    def __call__(self, t: int) -> int:
        """The difficulty at count ``t``."""
        return self.difficulty[sum(t > count for count in self.max_step)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CustomPacing(Pacing):
    """Any function that does not fall, up to a count from which on the difficulty is the greatest.

    That it does not fall is checked at a thousand counts, as everywhere would take forever with tokens as the clock.

    >>> pacing = CustomPacing(function=lambda t: 8 * 2 ** (t // 100), min_difficulty=8, max_difficulty=64, total=300)
    >>> [pacing(t) for t in (0, 100, 250, 300, 9_999)]
    [8, 16, 32, 64, 64]
    """

    function: Callable[[int], int]
    """Difficulty by count, in whole numbers."""
    min_difficulty: int
    """A lower bound of its values."""
    max_difficulty: int
    """Where it ends; the function's greater values are taken for this one."""
    total: int
    """The count at which the function has reached ``max_difficulty``."""

    def __post_init__(self):
        super().__post_init__()
        _check_at_least(self, 0, "total")
        name = getattr(self.function, "__name__", repr(self.function))
        first, last = self.function(0), self.function(self.total)
        if first < self.min_difficulty:
            raise ValueError(
                f"function={name} is {first} at 0, below min_difficulty={self.min_difficulty}"
            )
        if last < self.max_difficulty:
            raise ValueError(
                f"function={name} is {last} at total={self.total} and never reaches "
                f"max_difficulty={self.max_difficulty}; use a greater total or a smaller max_difficulty"
            )
        places = sorted({self.total * i // 1000 for i in range(1001)})
        values = [self.function(t) for t in places]
        for t, before, after in zip(places[1:], values[:-1], values[1:], strict=True):
            if after < before:
                raise ValueError(
                    f"function={name} falls from {before} to {after} before count {t}; a curriculum must not fall"
                )

    @property
    def end(self) -> int:
        """The count from which on the difficulty is the greatest."""
        return self.total

    def __call__(self, t: int) -> int:
        """The difficulty at count ``t``."""
        if t >= self.total:
            return self.max_difficulty
        value = self.function(t)
        if value != int(value):
            raise ValueError(f"function gives {value} at {t}; a difficulty is a whole number")
        return min(int(value), self.max_difficulty)
