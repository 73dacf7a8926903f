import itertools
import json
import os
import shutil
import signal

import numpy as np
import pytest

from effscale.experiments.moe import report
from effscale.experiments.moe.arms import ARMS, expert_counts
from effscale.experiments.moe.config import PRESETS, Config
from effscale.experiments.moe.experiment import main
from effscale.experiments.moe.runs import Training

ARMS_RUN = ("dense", "pr_moe", "pr_moe_mos")


@pytest.fixture(scope="module")
def options(corpus, tmp_path_factory):
    """Options of a run that takes seconds."""
    return [
        *("--preset", "smoke", "--corpus", corpus, "--validation-fraction", "0.1"),
        *("--cache", str(tmp_path_factory.mktemp("cache")), "--vocab-size", "300"),
        *("--steps", "8", "--length", "16", "--eval-every", "4", "--model.d-model", "16"),
    ]


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    main([*options, "--arms", *ARMS_RUN, "--out", str(folder)])
    return folder


def records(folder, name):
    lines = (folder / "seed-0" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_figures(finished):
    named = json.loads((finished / "results.json").read_text())
    for name in ARMS_RUN:
        assert named["unigram_entropy"] < named[f"{name}_val_loss"] < np.log(300)
    assert named["pr_moe_params"] > named["dense_params"]
    # The teacher's forward passes are counted while it is there.
    assert named["pr_moe_mos_teraflops"] > named["pr_moe_teraflops"]
    for name in ("losses", "curves"):
        figure = finished / "figures" / f"{name}.png"
        assert figure.read_bytes().startswith(b"\x89PNG")
        assert 3_000 < figure.stat().st_size < 100_000
    # Losses are of the text alone.
    first = records(finished, "pr_moe")[0]
    assert first["task_loss"] < first["loss"]


def test_the_teacher_leaves_after_its_share_of_the_steps(finished):
    """70 % of 8 steps are 6; the evaluation is of the student alone."""
    by_step = {r["step"]: r for r in records(finished, "pr_moe_mos") if "loss" in r}
    assert [step for step, r in by_step.items() if "divergence" in r] == [
        step for step in by_step if step <= 6
    ]


def test_a_stopped_student_goes_on_as_if_it_had_not_been(finished, tmp_path, monkeypatch):
    """It is stopped while its teacher is there; the other runs are finished already."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "seed-0" / "pr_moe_mos")
    with monkeypatch.context() as patch:
        real = Training._staged

        def killing(self):
            staged, calls = real(self), itertools.count(1)
            call = type(staged).__call__

            class Killing(type(staged)):
                def __call__(inner, state, batch, **kwargs):
                    if next(calls) == 5:
                        os.kill(os.getpid(), signal.SIGTERM)
                    return call(inner, state, batch, **kwargs)

            staged.__class__ = Killing
            return staged

        patch.setattr(Training, "_staged", killing)
        with pytest.raises(SystemExit) as stopped:
            main(["--out", str(out), "--resume"])
    assert stopped.value.code == 128 + signal.SIGTERM
    assert records(out, "pr_moe_mos")[-1]["step"] < 6
    main(["--out", str(out), "--resume"])
    assert records(out, "pr_moe_mos") == records(finished, "pr_moe_mos")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--arms", "dense", "pr_moe_kd"],
            "must be arms that include pr_moe, the teacher of pr_moe_kd",
        ),
        (["--arms", "dense", "dense"], "must be different arms"),
        (["--warmup", "8", "--steps", "8"], "Config.warmup must be below steps=8, got 8"),
        (
            ["--student-layers", "3"],
            "Config.student_layers must be from 2 to num_layers=2, got 3",
        ),
        (
            ["--router.capacity-factor", "0"],
            "RouterConfig.capacity_factor must be above 0",
        ),
        (["--num-experts", "1"], "Config.num_experts must be at least 2, got 1"),
        (["--teacher-leaves", "1"], "Config.teacher_leaves must be between 0 and 1, got 1.0"),
    ],
)
def test_a_wrong_option_is_answered_with_what_would_do(words, message, options, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*options, "--out", str(tmp_path / "run"), *words])
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in said
    assert not (tmp_path / "run").exists()


def test_help_is_quick(shown_by_help):
    heavy = ("matplotlib", "orbax", "grain", "tensorboardX", "tokenizers", "torch", "transformers")
    assert "--teacher-leaves" in shown_by_help("moe", heavy)


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
    assert expert_counts(ARMS[arm], 8, 4) == counts


def test_arms_that_are_compared_hold_and_compute_alike():
    """Halves hold as many experts as each other; a dense part beside one expert computes as two experts do, but for two logits."""
    config = Config()
    params = {name: report.count_params(config.transformer(name, 512)) for name in ARMS}
    flops = {name: report.teraflops(config, name, 512) for name in ARMS}
    assert params["first_half"] == params["second_half"] == params["moe"]
    assert params["residual"] < params["pr_moe"] < params["moe_double"]
    assert params["pr_moe_student"] == params["pr_moe_mos"] < params["pr_moe"]
    assert flops["first_half"] == flops["second_half"] == flops["moe"] < 1.01 * flops["dense"]
    np.testing.assert_allclose(flops["residual"], flops["top2"], rtol=2e-3)
    assert flops["dense_4x"] == 4 * flops["dense"]


def test_the_papers_model_has_the_papers_size():
    """350M+PR-MoE-32/64 has 4B parameters, and its student 3.5B."""
    config = PRESETS["paper"]
    count = lambda name: report.count_params(config.transformer(name, 50257)) / 1e9
    assert 3.5 < count("pr_moe") < 4.3
    assert 3.0 < count("pr_moe_mos") < 3.8
    assert 0.3 < count("dense") < 0.4


def test_what_dense_models_cost_to_reach_a_loss():
    costs, losses = [1.0, 2.0, 4.0], [4.1, 3.1, 2.6]
    assert report.cost_to_reach(3.1, costs, losses) == 2.0
    np.testing.assert_allclose(report.cost_to_reach(3.6, costs, losses), 2**0.5)
    np.testing.assert_allclose(report.cost_to_reach(2.85, costs, losses), 2**1.5)
    assert report.cost_to_reach(2.5, costs, losses) is None
    assert report.cost_to_reach(4.5, costs, losses) is None

    def arm(compute, seconds, *losses):
        made = [[{"step": 1, "val_loss": loss}] for loss in losses]
        return report.Runs(records=made, cpu_seconds=seconds, params=1, teraflops=compute)

    runs = {
        "dense": arm(1.0, [10.0, 10.0], 4.0, 4.2),
        "dense_2x": arm(2.0, [20.0, 40.0], 3.0, 3.2),
        "moe": arm(1.0, [16.0, 16.0], 3.0, 4.2),
    }
    found = report.figures(runs)
    assert found["dense_teraflops_to_moe_loss"] == 1.5
    assert found["dense_teraflops_over_moe"] == 1.5
    np.testing.assert_allclose(found["dense_cpu_seconds_over_moe"], (20 / 16 + 10 / 16) / 2)
    np.testing.assert_allclose(found["dense_teraflops_over_moe_std"], 2**0.5 / 2)
    runs["moe"] = arm(1.0, [16.0, 16.0], 3.0, 3.1)
    assert report.figures(runs)["dense_teraflops_over_moe"] is None
