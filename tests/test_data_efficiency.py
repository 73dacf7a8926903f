"""The plans of data efficiency: their accounting against slow counts, and their steps against the paper's."""

import collections
import math

import pytest

from effscale.data_efficiency import DataEfficiencyConfig, layer_tokens, make_plan
from effscale.models import gpt2

SCHEDULES = DataEfficiencyConfig(
    curriculum=0.5, min_length=8, dropping=0.75, min_kept=8, granularity=8
)
SMALL = gpt2(num_layers=5, d_model=8, num_heads=2, vocab_size=40, max_length=32)


def slow_shape(step, technique, steps=40, length=32):
    """Tokens of a row and tokens kept, from the papers: a curriculum counts steps from 1, random-LTD from 0."""

    def line(count, total):
        if count >= total:
            return length
        value = math.floor(count / total * (length - 8) + 8)
        return max(value - value % 8, 8)

    row = line(step + 1, 20) if technique in ("cl", "cl_ltd") else length
    kept = line(step, 30) if technique in ("ltd", "cl_ltd") else length
    return row, min(row, kept)


@pytest.mark.parametrize("technique", ["none", "cl", "ltd", "cl_ltd"])
def test_a_run_costs_what_its_steps_cost(technique):
    plan = make_plan(technique, SCHEDULES, SMALL, steps=40, batch_size=4, length=32)
    budget, step = 0, 0
    totals = collections.Counter()
    while budget < 40 * 4 * 32:
        row, kept = slow_shape(step, technique)
        assert plan.stages(step) == (row, kept)
        average = (row * 2 + kept * 3) // 5  # two of five layers see the whole row
        budget += 4 * average
        # Products of a layer: 12 d^2 a token (4 d^2 of attention, 8 d^2 of the feed-forward), and 2 d a score.
        layer = lambda tokens: tokens * 12 * 8 * 8 + 2 * 8 * tokens * tokens
        products = 2 * layer(row) + 3 * layer(kept) + row * 8 * 40
        # Multiplication and addition; the backward pass is twice the forward pass.
        totals += {"tokens_read": 4 * 32, "tokens_trained": 4 * row, "flops": 4 * 6 * products}
        step += 1
    assert plan.num_steps == step
    assert plan.consumed(step) == {"layer_tokens": budget, **totals}


def test_the_runs_of_the_paper_take_as_many_steps_as_in_megatron_deepspeed():
    model = gpt2(num_layers=24, d_model=32, num_heads=2, vocab_size=50, max_length=2048)
    schedules = {
        "cl": DataEfficiencyConfig(curriculum=110_000 / 286_102, min_length=80, granularity=8),
        "ltd": DataEfficiencyConfig(dropping=200_000 / 286_102, min_kept=128, granularity=16),
    }
    for technique, steps in {"cl": 339_169, "ltd": 372_789}.items():
        plan = make_plan(
            technique, schedules[technique], model, steps=286_102, batch_size=512, length=2048
        )
        cost = lambda shape: 512 * layer_tokens(model, shape)
        assert plan.stages.steps_until(300_000_000_000, cost) == steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curriculum": 0.0}, "curriculum must be above 0 and at most 1.*, got 0.0"),
        ({"dropping": 1.5}, "dropping must be above 0 and at most 1.*, got 1.5"),
        ({"min_percentile": 0}, "min_percentile must be from 1 to 100.*, got 0"),
        ({"min_length": 33}, "min_length must be at most the length of a row, 32.*, got 33"),
        ({"min_kept": 64}, "min_kept must be at most the length of a row, 32.*, got 64"),
        ({"granularity": 40}, "granularity must be at most the length of a row, 32.*, got 40"),
    ],
)
def test_a_schedule_that_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(
            "cl_ltd", DataEfficiencyConfig(**options), SMALL, steps=40, batch_size=4, length=32
        )
