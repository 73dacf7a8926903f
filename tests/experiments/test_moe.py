"""The study moe: its arms hold and compute what they are compared by, two steps of a student, and wrong options."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from effscale.command.line import parse
from effscale.experiments import moe
from effscale.experiments.shared.gpt import ModelConfig
from effscale.models import Transformer
from effscale.parallel import MeshConfig
from effscale.study.command import conduct


def test_two_steps_of_a_teacher_and_its_student(corpus, tmp_path):
    """The whole study, on tiny models: the teacher leaves after 70 % of the steps."""
    config = dataclasses.replace(
        moe.PRESETS["smoke"],
        corpus=(corpus,),
        validation_fraction=0.1,
        cache=tmp_path / "cache",
        out=tmp_path / "run",
        arms=("pr_moe", "pr_moe_mos"),
        vocab_size=300,
        steps=3,
        warmup=1,
        length=16,
        eval_every=3,
        model=ModelConfig(num_layers=2, d_model=16, num_heads=2, remat="none"),
    )
    figures = conduct(config, moe.study).figures
    assert figures["unigram_entropy"] < figures["pr_moe_mos_val_loss"]
    # The teacher's forward passes are counted while it is there.
    assert figures["pr_moe_mos_teraflops"] > figures["pr_moe_teraflops"]
    lines = (tmp_path / "run/pr_moe_mos/seed-0/metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if "loss" in record]
    assert ["divergence" in record for record in steps] == [True, True, False]
    assert steps[0]["task_loss"] < steps[0]["loss"]  # the evaluation is of the text alone


def test_the_papers_student_lowers_with_its_teacher():
    """One of the paper's layers with experts, on an ``expert`` axis of eight."""
    config = dataclasses.replace(
        moe.PRESETS["paper"],
        model=dataclasses.replace(moe.PRESETS["paper"].model, num_layers=2),
        student_layers=2,
    )
    run = dataclasses.replace(moe.run(config, "pr_moe_mos"), mesh=MeshConfig(data=1, expert=8))
    rows = jax.ShapeDtypeStruct((256, 2048), "int32")
    batch = dict.fromkeys(("input_ids", "labels", "segment_ids", "positions"), rows)
    teacher = moe.transformer(config, "pr_moe", config.vocab_size)
    frozen = lambda: Transformer(teacher, rngs=nnx.Rngs(0))
    assert "256x2048xi32" in run.lower(batch=batch, stage=0, frozen=frozen).as_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--warmup", "8", "--steps", "8"], "Config.warmup must be below steps=8, got 8"),
        (["--student-layers", "3"], "Config.student_layers must be from 2 to num_layers=2, got 3"),
        (["--router.capacity-factor", "0"], "RouterConfig.capacity_factor must be above 0"),
        (["--num-experts", "1"], "Config.num_experts must be at least 2, got 1"),
        (["--teacher-leaves", "1"], "Config.teacher_leaves must be between 0 and 1, got 1.0"),
    ],
)
def test_a_wrong_option_is_answered_with_what_would_do(words, message, capsys):
    with pytest.raises(SystemExit):
        parse(moe.PRESETS, "", ["--preset", "smoke", *words])
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_student_needs_its_teacher(corpus, tmp_path):
    config = dataclasses.replace(
        moe.PRESETS["smoke"],
        corpus=(corpus,),
        validation_fraction=0.1,
        cache=tmp_path,
        vocab_size=300,
    )
    with pytest.raises(ValueError, match="'pr_moe', which 'pr_moe_kd' needs"):
        moe.study(config).only(("dense", "pr_moe_kd"))


@pytest.mark.parametrize(
    ("arm", "counts"),
    [
        ("dense", [0] * 8),
        ("moe", [0, 4] * 4),
        ("pr_moe", [0, 4, 0, 4, 0, 4, 0, 8]),
        ("first_half", [4] * 4 + [0] * 4),
        ("second_half", [0] * 4 + [4] * 4),
    ],
)
def test_experts_of_each_layer(arm, counts):
    assert moe.expert_counts(moe.KINDS[arm], 8, 4) == counts


def test_arms_that_are_compared_hold_and_compute_alike():
    """Halves hold as many experts as each other; a dense part beside one expert computes as two experts do, but for two logits."""
    config = moe.Config()
    params = {name: moe.count_params(moe.transformer(config, name, 512)) for name in moe.KINDS}
    flops = {name: moe.teraflops(config, name, 512) for name in moe.KINDS}
    assert params["first_half"] == params["second_half"] == params["moe"]
    assert params["residual"] < params["pr_moe"] < params["moe_double"]
    assert params["pr_moe_student"] == params["pr_moe_mos"] < params["pr_moe"]
    assert flops["first_half"] == flops["second_half"] == flops["moe"] < 1.01 * flops["dense"]
    np.testing.assert_allclose(flops["residual"], flops["top2"], rtol=2e-3)
    assert flops["dense_4x"] == 4 * flops["dense"]


def test_the_papers_model_has_the_papers_size():
    """350M+PR-MoE-32/64 has 4B parameters, and its student 3.5B."""
    config = moe.PRESETS["paper"]
    count = lambda name: moe.count_params(moe.transformer(config, name, 50257)) / 1e9
    assert 3.5 < count("pr_moe") < 4.3
    assert 3.0 < count("pr_moe_mos") < 3.8
    assert 0.3 < count("dense") < 0.4


def test_what_dense_models_cost_to_reach_a_loss():
    costs, losses = [1.0, 2.0, 4.0], [4.1, 3.1, 2.6]
    assert moe.cost_to_reach(3.1, costs, losses) == 2.0
    np.testing.assert_allclose(moe.cost_to_reach(3.6, costs, losses), 2**0.5)
    np.testing.assert_allclose(moe.cost_to_reach(2.85, costs, losses), 2**1.5)
    assert moe.cost_to_reach(2.5, costs, losses) is None
    assert moe.cost_to_reach(4.5, costs, losses) is None
