"""The search for each arm's learning rate and warmup, with the same rule for all."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, NamedTuple

from effscale.options import Bounds, NonNegativeInt, Options, PositiveInt, check


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
class Search(Options):
    """A local search over a grid of learning rates and warmups, with runs on the whole budget.

    It starts at the config's own pair, tries the four neighbors, moves to the best one, and continues until a pair is
    better than all its neighbors. The result is therefore not at an edge, unless ``points`` ends the search before.
    """

    learning_rate_factor: Annotated[float, Bounds(above=1)] = 1.5
    """Ratio of neighboring learning rates in the grid."""
    warmup_factor: Annotated[float, Bounds(above=1)] | None = 2.0
    """Ratio of neighboring warmups in the grid; None searches only the learning rate."""
    points: PositiveInt = 16
    """Maximum number of runs per arm; 1 uses the point where the search would begin for all arms."""
    seed: NonNegativeInt = 1000
    """Seed of these runs; must differ from those of the compared runs."""

    def check_apart(self, seeds: int) -> None:
        """Raise a ValueError if the seed is one of those of the compared runs, 0 to ``seeds`` - 1."""
        wanted = f"at least seeds={seeds}, so that no compared run uses it"
        check(self, self.seed >= seeds, "seed", wanted)

    def climb(self, start: Point, loss_of: Callable[[Point], float]) -> "Found":
        """Search for the pair with the lowest loss.

        Args:
            start: The starting point.
            loss_of: Makes a run and returns its loss, infinite if it diverged. It is called once for each pair, and
                never if ``points`` is 1.

        Example:
            >>> search = Search(learning_rate_factor=2.0)
            >>> found = search.climb(Point(1.0, 8), lambda p: abs(p.learning_rate - 4) + abs(p.warmup - 16))
            >>> found.best, len(found.losses), found.settled
            (Point(learning_rate=4.0, warmup=16), 13, True)
        """

        def point(place: tuple[int, int]) -> Point:
            if place == (0, 0):
                return start  # exactly as given, without rounding
            rate = start.learning_rate * self.learning_rate_factor ** place[0]
            warmup = round(start.warmup * (self.warmup_factor or 1) ** place[1])
            return Point(float(f"{rate:.3g}"), max(warmup, 1))

        if self.points == 1:
            return Found(best=start, losses={}, settled=False)
        moves = [(-1, 0), (1, 0)] + ([(0, -1), (0, 1)] if self.warmup_factor is not None else [])
        best, losses = (0, 0), {start: loss_of(start)}
        while True:
            here = losses[point(best)]
            around = [(best[0] + i, best[1] + j) for i, j in moves]
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
