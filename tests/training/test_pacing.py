"""Pacing functions against numbers of DeepSpeed's, and against laws."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effscale.training import CustomPacing, DiscretePacing, LinearPacing, RootPacing


def rooted(minimum, maximum, total, step=1, degree=2, **more):
    return RootPacing(
        min_difficulty=minimum,
        max_difficulty=maximum,
        total=total,
        difficulty_step=step,
        root_degree=degree,
        **more,
    )


def linear(minimum, maximum, total, step=1):
    return LinearPacing(
        min_difficulty=minimum, max_difficulty=maximum, total=total, difficulty_step=step
    )


def test_deepspeeds_values():
    short = linear(2, 10, 8, step=2)
    assert [short(t) for t in range(1, 11)] == [2, 4, 4, 6, 6, 8, 8, 10, 10, 10]
    lengths = linear(80, 2048, 110_000, step=8)
    assert {t: lengths(t) for t in (447, 448, 1000, 55_000, 109_999, 110_000)} == {
        447: 80, 448: 88, 1000: 96, 55_000: 1064, 109_999: 2040, 110_000: 2048,
    }  # fmt: skip
    rarity = rooted(1, 100, 110_000)
    wanted = {11: 1, 12: 2, 100: 3, 1000: 10, 11_000: 32, 27_500: 50, 55_000: 71, 110_000: 100}
    assert {t: rarity(t) for t in wanted} == wanted
    discrete = DiscretePacing(difficulty=(1, 2, 3, 4, 5), max_step=(2, 4, 6, 8))
    assert [discrete(t) for t in range(1, 11)] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_half_of_the_percentiles_are_open_at_a_quarter_of_a_square_root():
    pacing = rooted(1, 100, 1000)
    assert (pacing(250), pacing(500)) == (50, 71)


def test_rounding_stays_at_the_smallest_difficulty():
    # Down to a multiple of 8 it would be 0.
    assert linear(5, 64, 100, step=8)(1) == 5


def test_the_greatest_difficulty_is_reached_at_the_total():
    # DeepSpeed stays at 192 until count 3982, as 197 is no multiple of 8.
    pacing = linear(32, 197, 3910, step=8)
    assert (pacing(3909), pacing(3910), pacing(3982)) == (192, 197, 197)


@given(
    st.integers(0, 300),
    st.integers(0, 2000),
    st.integers(1, 5000),
    st.one_of(st.none(), st.integers(1, 64)),
    st.integers(1, 4),
)
def test_levels_are_what_a_run_takes_in_order(minimum, extra, total, step, degree):
    pacing = rooted(minimum, minimum + extra, total, step, degree)
    taken = [pacing(t) for t in range(total + 2)]
    assert taken == sorted(taken)
    assert pacing.levels == tuple(dict.fromkeys(taken))
    for level in pacing.levels:
        assert pacing.first(level) == taken.index(level)
    if step is None:
        assert len(pacing.levels) <= 14


def test_about_a_dozen_levels_by_default():
    pacing = LinearPacing(min_difficulty=64, max_difficulty=1024, total=10_000)
    assert pacing.granularity == 80
    assert pacing.levels == (64, *range(80, 1024, 80), 1024)
    assert 12 <= len(pacing.levels) <= 14


def test_a_custom_function_is_latched_and_bounded():
    pacing = CustomPacing(
        function=lambda t: 10 + t // 2, min_difficulty=10, max_difficulty=20, total=30
    )
    assert [pacing(t) for t in (0, 1, 2, 19, 20, 29, 30, 1000)] == [10, 10, 11, 19, 20, 20, 20, 20]
    assert pacing.first(20) == 20
    assert pacing.levels == tuple(range(10, 21))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: linear(8, 4, 10), r"max_difficulty must be .*, got 4"),
        (lambda: linear(-1, 4, 10), r"min_difficulty must be .*, got -1"),
        (lambda: linear(1, 4, 0), r"total must be .*, got 0"),
        (lambda: linear(1, 4, math.inf), r"total must be .*, got inf"),
        (
            lambda: linear(1, math.nan, 10),
            r"max_difficulty must be an integer, got nan",
        ),
        (
            lambda: DiscretePacing(difficulty=(1, math.inf), max_step=(3,)),
            r"difficulty\[1\] must be an integer, got ",
        ),
        (
            lambda: DiscretePacing(difficulty=(1, 2), max_step=(math.inf,)),
            r"max_step\[0\] must be an integer, got ",
        ),
        (
            lambda: CustomPacing(function=int, min_difficulty=0, max_difficulty=1, total=math.inf),
            r"total must be .*, got inf",
        ),
        (lambda: linear(1, 4, 10, step=0), r"difficulty_step must be .*, got 0"),
        (lambda: rooted(1, 4, 10, degree=0), r"root_degree must be .*, got 0"),
        (
            lambda: rooted(1, 4, 10, clock="hours"),
            "clock must be one of 'steps', 'samples', 'tokens', got 'hours'",
        ),
        (lambda: DiscretePacing(difficulty=(), max_step=()), "difficulty"),
        (
            lambda: DiscretePacing(difficulty=(2, 1), max_step=(3,)),
            r"difficulty must be .*, got \(2, 1\)",
        ),
        (
            lambda: DiscretePacing(difficulty=(1, 2), max_step=(3, 4)),
            "max_step must be .*except the last, 1, got",
        ),
        (lambda: DiscretePacing(difficulty=(1, 2, 3), max_step=(4, 4)), "max_step"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, message, unchecked):
    with pytest.raises(ValueError, match=message):
        make()


def test_custom_functions_that_cannot_be_are_refused():
    def never(t):
        return min(t, 5)

    def falls(t):
        return 20 - abs(t - 20)

    with pytest.raises(
        ValueError, match=r"function must reach max_difficulty=.*got never, which is 5 at total=50"
    ):
        CustomPacing(function=never, min_difficulty=0, max_difficulty=8, total=50)
    with pytest.raises(
        ValueError, match="function must not decrease, got falls, which falls from 20 to 19"
    ):
        CustomPacing(function=falls, min_difficulty=0, max_difficulty=8, total=30)
    with pytest.raises(ValueError, match="at least min_difficulty=1"):
        CustomPacing(function=never, min_difficulty=1, max_difficulty=5, total=50)
    halves = CustomPacing(function=lambda t: t / 2, min_difficulty=0, max_difficulty=5, total=10)
    with pytest.raises(ValueError, match=r"function must return whole numbers, got 1\.5 at 3"):
        halves(3)


def test_a_level_beyond_the_end_is_an_error():
    with pytest.raises(ValueError, match="level must be at most the maximum difficulty 10, got 11"):
        linear(2, 10, 8).first(11)


def test_the_formula_is_the_papers():
    pacing = rooted(3, 90, 777, step=4, degree=3)
    for t in range(0, 777, 13):
        raw = math.floor((t / 777) ** (1 / 3) * 87 + 3)
        assert pacing(t) == max(3, raw - raw % 4)
