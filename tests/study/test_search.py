import math

import pytest

from effscale.study.search import Point, Search


def bowl(best: Point):
    """Losses with their least at ``best``, a power of two in each direction from the next, and the pairs asked for."""
    asked = []

    def loss_of(point):
        asked.append(point)
        return abs(math.log2(point.learning_rate / best.learning_rate)) + abs(
            math.log2(point.warmup / best.warmup)
        )

    return loss_of, asked


@pytest.mark.parametrize("start", [Point(1e-3, 60), Point(4e-3, 30), Point(8e-3, 120)])
def test_what_is_found_is_better_than_all_its_neighbours_wherever_the_walk_starts(start):
    best = Point(4e-3, 60)
    loss_of, asked = bowl(best)
    found = Search(learning_rate_factor=2.0, points=30).climb(start, loss_of)
    assert found.best == best
    assert found.settled
    around = {Point(2e-3, 60), Point(8e-3, 60), Point(4e-3, 30), Point(4e-3, 120)}
    assert around <= found.losses.keys()
    assert len(asked) == len(set(asked)) == len(found.losses)


@pytest.mark.parametrize("start", [Point(1.23456e-3, 7), Point(1e-3, 0), Point(1e-3, 10)])
def test_the_start_is_tried_as_it_was_given(start):
    """Neither the rounding of the grid nor the least warmup of 1 moves it."""
    search = Search(learning_rate_factor=2.0, points=30)
    found = search.climb(start, lambda point: 0.0 if point == start else 1.0)
    assert found.best == start
    assert found.settled


def test_the_search_ends_with_its_points_and_says_that_it_did_not_settle():
    loss_of, asked = bowl(Point(1.0, 60))
    found = Search(learning_rate_factor=2.0, points=6).climb(Point(1e-3, 60), loss_of)
    assert (len(asked), found.settled) == (6, False)
    assert found.losses[found.best] == min(found.losses.values())
    only = Search(points=1).climb(Point(1e-3, 60), loss_of)
    assert (only.best, only.losses, only.settled, len(asked)) == (Point(1e-3, 60), {}, False, 6)
