"""The study data_efficiency: a whole comparison on tiny models, the paper's run lowered, and wrong options."""

import collections
import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from effscale.command.line import parse
from effscale.data_efficiency import DataEfficiencyConfig, rank_by_rarity
from effscale.experiments import data_efficiency
from effscale.experiments.data_efficiency import PRESETS, plan, run
from effscale.experiments.shared.gpt import ModelConfig
from effscale.models import num_params, preset
from effscale.study import Point, Search
from effscale.study.command import conduct
from effscale.study.table import Table


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """Both techniques on a half of the budget, after a search of two points."""
    folder = tmp_path_factory.mktemp("data_efficiency")
    config = dataclasses.replace(
        PRESETS["smoke"],
        corpus=(corpus,),
        validation_fraction=0.2,
        cache=folder / "cache",
        out=folder / "run",
        arms=("none_100", "cl_ltd_100"),
        vocab_size=300,
        length=32,
        batch_size=8,
        steps=4,
        warmup=1,
        evaluations=2,
        search=Search(points=2),
        efficiency=DataEfficiencyConfig(min_length=16, min_kept=16, granularity=16),
        model=ModelConfig(num_layers=3, d_model=16, num_heads=2, remat="none"),
    )
    return config, conduct(config, data_efficiency.study).figures


def test_costs_are_those_of_the_plan(finished):
    config, figures = finished
    planned = plan(config, "cl_ltd", 1.0, 300)
    assert figures["cl_ltd_100_updates"] == planned.num_steps > config.steps
    for name, count in planned.consumed(planned.num_steps).items():
        assert figures[f"cl_ltd_100_{name}"] == count
    records = (config.out / "cl_ltd_100/seed-0/metrics.jsonl").read_text().splitlines()
    last = json.loads(records[-2])
    assert last["tokens"] == figures["cl_ltd_100_layer_tokens"]


def test_the_search_and_the_comparison_measure_different_rows(finished):
    """What the search found is used on every part of the budget, with its share of the warmup."""
    config, figures = finished
    assert figures["cl_ltd_100_search_runs"] == 2
    assert not any("search" in row.arm for row in Table.read(config.out / "table.csv").rows)
    rows = data_efficiency.Rows(config, rows_text(config))
    tune, report = (rows.held_out(tuning=tuning) for tuning in (True, False))
    seen = lambda batches: {row.tobytes() for batch in batches for row in batch["input_ids"]}
    assert seen(tune)
    assert not seen(tune) & seen(report)
    whole = data_efficiency.Rows(
        dataclasses.replace(config, search=Search(points=1)), rows_text(config)
    )
    assert seen(whole.held_out(tuning=False)) == seen(tune) | seen(report)


def rows_text(config):
    return data_efficiency.Text(*data_efficiency.prepared_corpora(config))


def test_rows_of_frequent_tokens_come_first(finished):
    """The ranking and its pacing against slow counts."""
    config, _ = finished
    rows = data_efficiency.Rows(config, rows_text(config))
    packed, size = rows.packed, config.batch_size
    counts = collections.Counter(rows.store.tokens.tolist())
    total = sum(max(counts[token], 1) for token in range(300))
    rarity = [
        math.floor(
            sum(-math.log(counts[int(t)] / total) for t in [*r["input_ids"], r["labels"][-1]])
        )
        for r in (packed[i] for i in range(len(packed)))
    ]
    easiest = sorted(range(len(packed)), key=lambda row: (rarity[row], row))
    assert rank_by_rarity(packed).samples.tolist() == easiest

    row_of = {packed[i]["input_ids"].tobytes(): i for i in range(len(packed))}
    place = {row: i for i, row in enumerate(easiest)}
    steps = round(20 / config.efficiency.curriculum)
    batches = iter(rows.train("cl", steps, seed=3))
    for step in range(30):
        seen = [place[row_of[row.tobytes()]] for row in next(batches)["input_ids"]]
        # The root of degree 2 of the share of the curriculum's 20 steps, in percent of the rows.
        percent = min(100, math.floor(math.sqrt(min(1, (step + 1) / 20)) * 99 + 1))
        allowed = len(packed) if percent == 100 else len(packed) // 100 * percent
        assert max(seen) < allowed
        assert len(set(seen)) == min(size, allowed)
    again = iter(rows.train("cl", steps, seed=4))
    assert not np.array_equal(next(again)["input_ids"], next(batches)["input_ids"])


def test_plain_training_reaches_its_own_loss_with_all_of_its_cost(finished):
    _, figures = finished
    for cost in data_efficiency.COSTS:
        assert figures[f"none_{cost}_to_baseline"] <= 1.0
        assert figures[f"none_{cost}_saved"] == 1 - figures[f"none_{cost}_to_baseline"]


def test_all_points_of_a_search_are_one_program():
    config = dataclasses.replace(PRESETS["smoke"], mesh=data_efficiency.MeshConfig(data=-1))
    ids = jax.ShapeDtypeStruct((8, 64), "int32")
    batch = dict.fromkeys(("input_ids", "labels", "segment_ids", "positions"), ids)
    texts = {
        run(config, "ltd", 1.0, point, 300).lower(batch=batch, stage=0).as_text()
        for point in (Point(1e-3, 4), Point(3e-3, 8))
    }
    assert len(texts) == 1


def test_the_paper_preset_is_gpt3_and_lowers():
    paper = PRESETS["paper"]
    planned = plan(paper, "cl_ltd", 1.0, paper.vocab_size)
    assert num_params(planned.model) == num_params(preset("gpt3-1.3b"))
    assert paper.steps == 300_000_000_000 // (512 * 2048)
    one = run(paper, "cl_ltd", 1.0, Point(paper.learning_rate, paper.warmup), paper.vocab_size)
    ids = jax.ShapeDtypeStruct((512, 2048), "int32")
    batch = dict.fromkeys(("input_ids", "labels", "segment_ids", "positions"), ids)
    lowered = one.lower(batch=batch, stage=planned.stages.values.index((1152, 768)))
    _, rows = lowered.args_info[0]
    assert rows["input_ids"].shape == (512, 1152)
    assert rows["kept_tokens"].kept == 768


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fractions", "1.0", "1.5"], "fractions[1] must be"),
        (["--fractions", "0.5"], "must be different numbers that include 1.0"),
        (["--fractions", "1.0", "1.0"], "must be different numbers that include 1.0"),
        (["--model.num-layers", "2"], "leaves none of 2. Use a model with at least 3 layers"),
        (["--efficiency.min-length", "512"], "min_length must be at most the length of a row, 256"),
        (["--efficiency.curriculum", "1.2"], "curriculum must be above 0 and at most 1, got 1.2"),
        (["--warmup", "400"], "warmup must be from 0 to below steps=400, got 400"),
        (["--evaluations", "500"], "evaluations must be from 1 to steps=400, got 500"),
    ],
)
def test_a_wrong_option_is_answered_with_what_would_do(words, message, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parse(PRESETS, "", words)
    assert message in capsys.readouterr().err


def test_a_corpus_with_fewer_rows_than_percentiles(finished):
    config, _ = finished
    longer = dataclasses.replace(config, length=4096)
    with pytest.raises(
        ValueError, match=r"at least 100 rows, but the corpus has .* of length=4096"
    ):
        data_efficiency.Rows(longer, rows_text(config))
