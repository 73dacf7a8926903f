"""Stages against a loop over all steps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effscale.training import DiscretePacing, LinearPacing, RootPacing, Stages, merge, stages

PACINGS = st.builds(
    lambda minimum, extra, total, step, degree, clock: RootPacing(
        min_difficulty=minimum,
        max_difficulty=minimum + extra,
        total=total,
        difficulty_step=step,
        root_degree=degree,
        clock=clock,
    ),
    st.integers(1, 50),
    st.integers(0, 200),
    st.integers(1, 3000),
    st.integers(1, 32),
    st.integers(1, 3),
    st.sampled_from(["steps", "samples", "tokens"]),
)


@given(PACINGS, st.integers(0, 2))
def test_every_step_has_the_value_of_its_count(pacing, offset):
    cost = lambda difficulty: 3 * difficulty
    found = stages(pacing, offset=offset, cost=cost)
    consumed = 0
    for step in range(found.starts[-1] + 3):
        count = step + offset if pacing.clock == "steps" else consumed
        assert found(step) == pacing(count)
        consumed += cost(found(step))
    assert found.values[-1] == pacing.max_difficulty
    assert len(set(found.values)) == len(found.values)


@given(PACINGS, st.integers(0, 200_000))
def test_costs_add_up(pacing, amount):
    found = stages(pacing, cost=lambda difficulty: difficulty)
    cost = lambda difficulty: 2 * difficulty + 1
    steps = found.steps_until(amount, cost)
    assert found.total(steps, cost) >= amount
    if steps:
        assert found.total(steps - 1, cost) < amount
    some = min(steps, 300)
    assert found.total(some, cost) == sum(cost(found(step)) for step in range(some))


def test_a_gpt_recipes_changes():
    # DeepSpeed's GPT-3 1.3B recipe: 128 to 2048 tokens in steps of 16 over 200,000 steps, counted from 0.
    kept = LinearPacing(min_difficulty=128, max_difficulty=2048, total=200_000, difficulty_step=16)
    found = stages(kept, offset=0)
    assert len(found.values) == 121
    assert (found(1666), found(1667), found(199_999), found(200_000)) == (128, 144, 2032, 2048)
    lengths = LinearPacing(min_difficulty=80, max_difficulty=2048, total=110_000, difficulty_step=8)
    both = merge(stages(lengths), found)
    # The first step at which fewer tokens are kept than the batch is long.
    assert (
        next(step for step, (s, r) in zip(both.starts, both.values, strict=True) if r < s) == 4918
    )
    assert both(4918) == (168, 160)


def test_merging_keeps_each_schedule():
    a, b = Stages((0, 3, 7), (1, 2, 3)), Stages((0, 3, 5), ("x", "y", "x"))
    both = merge(a, b)
    assert [both(step) for step in range(10)] == [(a(step), b(step)) for step in range(10)]
    assert both.starts == (0, 3, 5, 7)


def test_equal_neighbours_become_one_stage():
    assert Stages((0, 3, 7), (8, 16, 24)).map(lambda v: v // 16) == Stages((0, 3), (0, 1))


def test_a_curriculum_that_begins_late_in_its_pacing():
    pacing = DiscretePacing(difficulty=(1, 2, 3), max_step=(0, 1))
    assert stages(pacing, offset=2) == Stages((0,), (3,))


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"starts must begin with 0 .*got \(1, 2\)"):
        Stages((1, 2), (1, 2))
    with pytest.raises(ValueError, match=r"starts must be increasing, got \(0, 0\)"):
        Stages((0, 0), (1, 2))
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        Stages((0,), (1,))(-1)
    with pytest.raises(ValueError, match="amount must be reachable, got 10"):
        Stages((0, 2), (1, 2)).steps_until(10, lambda v: 2 if v == 1 else 0)
    tokens = LinearPacing(min_difficulty=1, max_difficulty=9, total=99, clock="tokens")
    with pytest.raises(ValueError, match="clock='tokens' needs cost"):
        stages(tokens)
    with pytest.raises(ValueError, match="cost must be at least 1, got 0 at difficulty 1"):
        stages(tokens, cost=lambda difficulty: 0)
