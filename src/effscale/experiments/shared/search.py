"""The search for each technique's learning rate and warmup, with the same rule for all."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from effscale.models.validation import check, check_finite


class Point(NamedTuple):
    """A point of the search.

    Attributes:
        learning_rate: The peak of the schedule.
        warmup: Warmup steps.
    """

    learning_rate: float
    warmup: int

    @property
    def name(self) -> str:
        """The name of the run's folder, such as ``rate-0.001_warmup-60``."""
        return f"rate-{self.learning_rate:g}_warmup-{self.warmup}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """A local search over a grid of learning rates and warmups, with runs on the whole budget.

    It starts at the config's own pair, tries the four neighbors, moves to the best one, and continues until a pair is
    better than all its neighbors. The result is therefore not at an edge, unless ``points`` ends the search before.
    """

    learning_rate_factor: float = 1.5
    """Ratio of neighboring learning rates in the grid."""
    warmup_factor: float = 2.0
    """Ratio of neighboring warmups in the grid."""
    points: int = 16
    """Maximum number of runs per technique; 1 uses the config's own pair for all techniques."""
    seed: int = 1000
    """Seed of these runs; must differ from those of the compared runs."""

    def __post_init__(self):
        check_finite(self)
        for name in ("learning_rate_factor", "warmup_factor"):
            check(self, getattr(self, name) > 1, name, "above 1")
        check(self, self.points >= 1, "points", "at least 1")
        check(self, self.seed >= 0, "seed", "at least 0")

    def check_apart(self, seeds: int) -> None:
        """Raise a ValueError if the seed is one of those of the compared runs, 0 to ``seeds`` - 1."""
        wanted = f"at least seeds={seeds}, so that no compared run uses it"
        check(self, self.seed >= seeds, "seed", wanted)

    def climb(self, start: Point, steps: int, loss_of: Callable[[Point], float]) -> "Found":
        """Search for the pair with the lowest loss.

        Args:
            start: The starting point.
            steps: Number of steps of a run; a warmup stays below it.
            loss_of: Makes a run and returns its loss, infinite if it diverged. It is called once for each pair, and
            never if ``points`` is 1.

        Example:
            >>> search = Search(learning_rate_factor=2.0)
            >>> found = search.climb(Point(1.0, 8), 100, lambda p: abs(p.learning_rate - 4) + abs(p.warmup - 16))
            >>> found.best, len(found.losses), found.settled
            (Point(learning_rate=4.0, warmup=16), 13, True)
        """

        def point(place: tuple[int, int]) -> Point:
            if place == (0, 0):
                return start  # exactly as given, without rounding
            rate = start.learning_rate * self.learning_rate_factor ** place[0]
            warmup = round(start.warmup * self.warmup_factor ** place[1])
            return Point(float(f"{rate:.3g}"), min(max(warmup, 1), steps - 1))

        if self.points == 1:
            return Found(best=start, losses={}, settled=False)
        best, losses = (0, 0), {start: loss_of(start)}
        while True:
            here = losses[point(best)]
            around = [(best[0] + i, best[1] + j) for i, j in ((-1, 0), (1, 0), (0, -1), (0, 1))]
            for place in around:
                if point(place) not in losses and len(losses) < self.points:
                    losses[point(place)] = loss_of(point(place))
            next_best = min(around, key=lambda place: losses.get(point(place), float("inf")))
            settled = all(point(place) in losses for place in around)
            if losses.get(point(next_best), float("inf")) >= here or not settled:
                best_point = min(losses, key=lambda each: losses[each])
                return Found(best=best_point, losses=losses, settled=settled)
            best = next_best


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """The result of a search.

    Attributes:
        best: The pair with the lowest loss.
        losses: Loss of every pair that was tried, in order.
        settled: Whether all neighbors of the best pair were tried.
    """

    best: Point
    losses: dict[Point, float]
    settled: bool
