"""The shared pretraining: its accounting against slow counts, its data against a slow ranking, its steps against its plan."""

import collections
import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effscale.data import PackedTokens, parse_source, prepare_corpus
from effscale.data_efficiency import (
    DataEfficiencyConfig,
    layer_tokens,
    make_plan,
)
from effscale.experiments.shared.gpt import ModelConfig
from effscale.experiments.shared.pretraining import Pretraining, rank_by_rarity
from effscale.experiments.shared.pretraining_config import PretrainingConfig
from effscale.models import gpt2
from effscale.parallel import MeshConfig
from effscale.training import read_jsonl

SCHEDULES = DataEfficiencyConfig(
    curriculum=0.5, min_length=8, dropping=0.75, min_kept=8, granularity=8
)
FEW_SHAPES = dataclasses.replace(SCHEDULES, min_length=16, min_kept=16, granularity=16)
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


def config(technique, **options):
    return PretrainingConfig(
        technique=technique,
        efficiency=FEW_SHAPES,
        steps=40,
        warmup=4,
        batch_size=8,
        length=32,
        vocab_size=320,
        learning_rate=1e-2,
        model=ModelConfig(num_layers=3, d_model=16, num_heads=2, remat="none"),
        eval_every=20,
        checkpoint_every=7,
        **options,
    )


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return prepare_corpus(parse_source(corpus), cache, vocab_size=320, validation_fraction=0.1)


def test_rows_of_frequent_tokens_come_first(prepared):
    rows = PackedTokens(prepared.train, 32)
    counts = collections.Counter(prepared.train.tokens.tolist())
    total = sum(max(counts[token], 1) for token in range(prepared.vocab_size))
    rarity = [
        math.floor(
            sum(-math.log(counts[int(t)] / total) for t in [*r["input_ids"], r["labels"][-1]])
        )
        for r in (rows[i] for i in range(len(rows)))
    ]
    easiest = sorted(range(len(rows)), key=lambda row: (rarity[row], row))
    assert rank_by_rarity(rows).samples.tolist() == easiest

    training = Pretraining(config("cl"), prepared.vocab_size, MeshConfig(data=8).build())
    row_of = {rows[i]["input_ids"].tobytes(): i for i in range(len(rows))}
    place = {row: i for i, row in enumerate(easiest)}
    batches = iter(training.batches([prepared.train], seed=3))
    for step in range(30):
        seen = [place[row_of[row.tobytes()]] for row in next(batches)["input_ids"]]
        # The root of degree 2 of the share of the curriculum's 20 steps, in percent of the rows.
        percent = min(100, math.floor(math.sqrt(min(1, (step + 1) / 20)) * 99 + 1))
        allowed = len(rows) if percent == 100 else len(rows) // 100 * percent
        assert max(seen) < allowed
        assert len(set(seen)) == min(8, allowed)
    again = training.batches([prepared.train], seed=4)
    assert not np.array_equal(next(iter(again))["input_ids"], next(batches)["input_ids"])


def slow_rate(run, plan, step):
    """The learning rate of a step: up along a line by steps, then down along a cosine by layer-averaged tokens."""
    peak, final = run.learning_rate, run.learning_rate / 10
    if step <= run.warmup:
        return peak * step / run.warmup
    tokens = lambda count: plan.consumed(count)["layer_tokens"]
    begin, end = tokens(run.warmup), run.steps * run.batch_size * run.length
    return (
        final
        + (peak - final) * (1 + math.cos(math.pi * (tokens(step) - begin) / (end - begin))) / 2
    )


@pytest.mark.parametrize("technique", ["none", "cl", "ltd", "cl_ltd"])
def test_every_technique_warms_up_in_as_many_steps(technique, prepared):
    run = config(technique)
    plan, schedule, params = run.plan(prepared.vocab_size), run.schedule(), {"w": jnp.ones(1)}
    state = schedule.init(params)
    for step in range(plan.num_steps):
        tokens = jnp.float32(plan.consumed(step)["layer_tokens"])
        updates, state = schedule.update(params, state, tokens=tokens)
        assert -float(updates["w"][0]) == pytest.approx(slow_rate(run, plan, step), rel=1e-4)


def test_one_compiled_step_serves_every_learning_rate_and_warmup():
    leaves = [jax.tree.leaves(run.schedule().init(None)) for run in (config("ltd"), config("none"))]
    assert [x.dtype for x in leaves[0]] == [x.dtype for x in leaves[1]]
    update = jax.jit(
        lambda state: config("ltd").schedule().update(jnp.ones(1), state, tokens=0.0)[1]
    )
    rate = lambda run: float(update(update(run.schedule().init(None))).inner_state.learning_rate)
    slow = dataclasses.replace(config("ltd"), learning_rate=1e-3, warmup=10)
    assert rate(slow) == pytest.approx(1e-3 / 10, rel=1e-5)
    assert rate(config("ltd")) == pytest.approx(1e-2 / 4, rel=1e-5)


class Breaking:
    """Batches that break off before a step."""

    def __init__(self, batches, step):
        self.iterator, self.step = iter(batches), step
        self.get_state, self.set_state = self.iterator.get_state, self.iterator.set_state

    def __iter__(self):
        return self

    def __next__(self):
        self.step -= 1
        if self.step < 0:
            raise KeyboardInterrupt
        return next(self.iterator)


def train(prepared, place, technique, break_at=None):
    """A run in ``place``, from the start or from its last checkpoint."""
    mesh = MeshConfig(data=8).build()
    run = config(technique, out=place, resume=True)
    training = Pretraining(run, prepared.vocab_size, mesh)
    held_out = training.held_out([prepared.validation])
    batches = training.batches([prepared.train], seed=0)
    with jax.set_mesh(mesh):
        result = training.train(
            batches if break_at is None else Breaking(batches, break_at),
            place,
            config=run,
            evaluate=lambda state: training.validate(state, held_out),
            tensorboard=place / "tensorboard",
        )
    return training, result, place


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    """A run under both techniques."""
    return train(prepared, tmp_path_factory.mktemp("pretraining"), "cl_ltd")


@pytest.mark.parametrize(
    "technique",
    # The last one has the parts of the others.
    [*(pytest.param(t, marks=pytest.mark.slow) for t in ("none", "cl", "ltd")), "cl_ltd"],
)
def test_a_run_that_breaks_off_goes_on_exactly(technique, prepared, trained, tmp_path):
    whole = (
        trained[2] if technique == "cl_ltd" else train(prepared, tmp_path / "whole", technique)[2]
    )
    place = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        train(prepared, place, technique, break_at=17)
    assert len(read_jsonl(place / "metrics.jsonl")) >= 15
    train(prepared, place, technique)
    ours, theirs = ((folder / "metrics.jsonl").read_bytes() for folder in (place, whole))
    assert ours == theirs


def test_steps_count_and_cost_as_planned(trained):
    training, result, place = trained
    plan = training.plan
    records = [r for r in read_jsonl(place / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in records] == list(range(1, plan.num_steps + 1))
    for record in records:
        assert record["tokens"] == plan.consumed(record["step"])["layer_tokens"]
        rate = slow_rate(training.config, plan, record["step"] - 1)
        assert record["learning_rate"] == pytest.approx(rate, rel=1e-4)
    # Documents begin in rows, and what precedes a beginning has no weight: not more labels than inputs.
    weights = [r["weight"] for r in records]
    assert all(
        0.8 * 8 * plan.stages(i)[0] < w <= 8 * plan.stages(i)[0] for i, w in enumerate(weights)
    )
    assert len(result.compilations) == len(set(plan.stages.values)) == len(plan.stages.values)
    assert sum(not c.background for c in result.compilations) == 1
    assert records[-1]["loss"] < records[0]["loss"] - 0.5


def test_validation_is_on_all_tokens_of_whole_rows(trained, prepared):
    _, result, place = trained
    model, total, weight = jax.device_get(result.state.model), 0.0, 0.0
    rows = PackedTokens(prepared.validation, 32, drop_remainder=False)
    logits_of = jax.jit(lambda ids, at, seg: model(ids, positions=at, segment_ids=seg))
    for i in range(len(rows)):
        row = {name: jnp.asarray(x)[None] for name, x in rows[i].items()}
        logits = np.asarray(
            logits_of(row["input_ids"], row["positions"], row["segment_ids"])[0], np.float64
        )
        normalizer = np.log(np.exp(logits).sum(axis=-1))
        losses = normalizer - logits[np.arange(32), rows[i]["labels"]]
        total += (losses * rows[i]["loss_weights"]).sum()
        weight += rows[i]["loss_weights"].sum()
    last = [r for r in read_jsonl(place / "metrics.jsonl") if "val_loss" in r][-1]
    assert last["val_loss"] == pytest.approx(total / weight, rel=1e-5)


def test_a_corpus_with_fewer_rows_than_percentiles(tmp_path):
    file = pathlib.Path(tmp_path) / "short.jsonl"
    file.write_text("".join(f'{{"text": "the {i} cats sleep"}}\n' for i in range(100)))
    small = prepare_corpus(
        parse_source(f"jsonl:{file}"), tmp_path / "cache", vocab_size=280, validation_fraction=0.1
    )
    mesh = MeshConfig(data=8).build()
    training = Pretraining(config("cl"), small.vocab_size, mesh)
    with pytest.raises(
        ValueError, match=r"needs at least 100 rows, but the corpus has \d+ of length=32"
    ):
        training.batches([small.train], seed=0)
