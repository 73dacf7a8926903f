"""The study ``bloom_ablations``: what each arm is, that only that differs, two steps of two arms, and wrong options."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from effscale.command.line import parse
from effscale.experiments import bloom_ablations
from effscale.experiments.shared.gpt import ModelConfig
from effscale.models.positions import Alibi, LearnedPositions, Rotary
from effscale.parallel import MeshConfig
from effscale.study import Point
from effscale.study.command import conduct
from effscale.training import read_jsonl


def test_two_steps_of_two_arms(corpus, tmp_path, monkeypatch):
    """The whole study with a search, on one device, which compiles faster than eight."""
    build = MeshConfig.build
    monkeypatch.setattr(
        MeshConfig, "build", lambda mesh, devices=None: build(mesh, jax.devices()[:1])
    )
    config = dataclasses.replace(
        bloom_ablations.PRESETS["smoke"],
        corpus=(corpus,),
        validation_fraction=0.1,
        cache=tmp_path / "cache",
        out=tmp_path / "run",
        arms=("alibi", "learned"),
        vocab_size=320,
        length=16,
        steps=2,
        warmup=1,
        eval_every=2,
        model=ModelConfig(num_layers=1, d_model=16, num_heads=2, remat="none"),
    )
    figures = conduct(config, bloom_ablations.study).figures
    for arm in ("alibi", "learned"):
        losses = [figures[f"{arm}_val_loss"], figures[f"{arm}_val_loss_2_times_longer"]]
        assert np.isfinite(losses).all()
        assert figures[f"{arm}_search_runs"] == 2
    # The points of a search share a program; each trains at its own rate.
    points = sorted((tmp_path / "run/search/alibi").iterdir())
    rates = [read_jsonl(point / "metrics.jsonl")[1]["learning_rate"] for point in points]
    np.testing.assert_allclose(rates, [0.00267, 0.004], rtol=1e-6)
    assert (tmp_path / "run/figures/bloom_ablations.png").stat().st_size > 5_000


def test_arms_differ_in_what_they_are_about_alone():
    config = bloom_ablations.PRESETS["default"]
    runs = {arm: bloom_ablations.run(config, arm, 300) for arm in bloom_ablations.ARMS}
    kinds = {
        "alibi": Alibi,
        "rotary": Rotary,
        "learned": LearnedPositions,
        "alibi_without_norm": Alibi,
    }
    bloom = runs["alibi"].model
    for arm, run in runs.items():
        assert isinstance(run.model.positions, kinds[arm])
        assert (run.model.inputs.norm is None) == (arm == "alibi_without_norm")
        same = dataclasses.replace(run.model, positions=bloom.positions, inputs=bloom.inputs)
        assert same == bloom
    assert runs["learned"].model.positions.num == 512  # the longest evaluation rows


def test_a_point_of_the_search_sets_the_whole_schedule():
    """As if the run had been made for the point, whose warmup may be as long as the run."""
    config = bloom_ablations.PRESETS["smoke"]
    run = bloom_ablations.run(config, "alibi", 300)
    point = Point(1e-2, 3)
    set_later = run.create(hyperparams=bloom_ablations.rates(config, point)).opt_state
    made = dataclasses.replace(config, learning_rate=1e-2, warmup=3)
    other = bloom_ablations.run(made, "alibi", 300).create().opt_state
    for name in ("peak", "warmup_steps", "final", "total_tokens"):
        values = [optax.tree.get(state, name) for state in (set_later, other)]
        assert values[0] == values[1]
        assert values[0].dtype == values[1].dtype
    assert bloom_ablations.rates(config, Point(1e-2, 8))["warmup_steps"] == 7


def test_the_papers_step_lowers():
    config = bloom_ablations.PRESETS["paper"]
    run = bloom_ablations.run(config, "alibi", config.vocab_size)
    rows = jax.ShapeDtypeStruct((config.batch_size, config.length), "int32")
    batch = dict.fromkeys(("input_ids", "labels", "segment_ids", "positions"), rows)
    assert "512x2048xi32" in run.lower(batch=batch).as_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--times-longer", "2", "1"], "Config.times_longer must be increasing whole numbers"),
        (["--times-longer", "2"], "starting with 1, got (2,)"),
        (["--warmup", "8"], "Config.warmup must be from 0 to below steps=8, got 8"),
    ],
)
def test_a_wrong_option_is_answered_with_what_would_do(words, message, capsys):
    with pytest.raises(SystemExit):
        parse(bloom_ablations.PRESETS, "", ["--preset", "smoke", *words])
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
