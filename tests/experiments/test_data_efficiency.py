"""The experiment data_efficiency: what a run leaves, its figures against counts by hand, exact resume, wrong options."""

import dataclasses
import json
import pathlib
import shutil
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from effscale.experiments.data_efficiency import report
from effscale.experiments.data_efficiency.config import PRESETS
from effscale.experiments.data_efficiency.experiment import main
from effscale.experiments.data_efficiency.figures import draw
from effscale.experiments.data_efficiency.runs import Runner
from effscale.experiments.lab_book import MAX_FIGURE_BYTES
from effscale.experiments.shared.pretraining import Pretraining
from effscale.experiments.shared.pretraining_plan import make_plan
from effscale.study.results import show_rows
from effscale.study.search import Point
from effscale.training import RunFolder, TrainingDivergedError
from effscale.training.saved import config_from_json

PROGRAM = pathlib.Path(__file__).with_name("data_efficiency_killed.py")
SEARCHED = [
    f"search/{t}/rate-{r}_warmup-4" for t in ("none", "cl_ltd") for r in ("0.01", "0.00667")
]
RUNS = [f"{t}/fraction-{f}/seed-0" for f in ("1", "0.5") for t in ("none", "cl_ltd")]


@pytest.fixture(scope="session")
def small(corpus, tmp_path_factory):
    """Options of a run that takes seconds."""
    cache = tmp_path_factory.mktemp("cache")
    return [
        *("--preset", "smoke", "--corpus", corpus, "--validation-fraction", "0.1"),
        *("--cache", str(cache), "--vocab-size", "320", "--techniques", "none", "cl_ltd"),
        *("--learning-rate", "1e-2", "--checkpoint-every", "6"),
    ]


@pytest.fixture(scope="session")
def whole(start, small, tmp_path_factory):
    """A finished run that was never stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = start("-m", "effscale.experiments.data_efficiency", *small, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done


def records(folder, run):
    return [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_it_promises(whole):
    folder, done = whole
    results = json.loads((folder / "results.json").read_text())
    assert pathlib.Path(results.pop("folder")) == folder
    seeds, tables = results.pop("seeds"), results.pop("tables")
    numbers = results
    for name, value in numbers.items():
        reaching = name.endswith(("_to_baseline", "_saved")) and value is None
        assert reaching or np.isfinite(value), name
    assert seeds["cl_ltd_50_val_loss"] == [numbers["cl_ltd_50_val_loss"]]
    assert numbers["cl_ltd_50_difference"] == pytest.approx(
        numbers["cl_ltd_50_val_loss"] - numbers["none_50_val_loss"]
    )
    assert [table["title"][:4] for table in tables] == ["Resu", "Fina", "Cost", "Cost", "Save"]
    for arm in ("none_100", "none_50", "cl_ltd_100", "cl_ltd_50"):
        assert numbers[f"{arm}_val_loss_min"] <= numbers[f"{arm}_val_loss"]
        assert numbers[f"{arm}_val_loss"] <= numbers[f"{arm}_val_loss_max"]
        assert 0 < numbers[f"{arm}_seconds"] < numbers[f"{arm}_wall_seconds"]
    # Rows of 64 tokens, 4 in a batch; 32 steps of plain training are the budget.
    assert numbers["none_100_tokens_read"] == numbers["none_100_layer_tokens"] == 32 * 4 * 64
    assert numbers["none_50_tokens_read"] == 16 * 4 * 64
    assert (numbers["none_100_compilations"], numbers["cl_ltd_100_compilations"]) == (1, 3)
    report_text = (folder / "report.md").read_text()
    for shown in ("| curriculum + random-LTD | 50 % |", "![curves](figures/curves.png)"):
        assert shown in report_text
    assert "Saved by the schedules" in done.stdout
    for name in ("curves", "budgets"):
        content = (folder / "figures" / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) < MAX_FIGURE_BYTES
    assert (folder / "tokenizer.json").is_file()
    assert not list(folder.rglob("checkpoints"))
    assert list((folder / "tensorboard" / RUNS[1]).iterdir())


def test_stages_and_counts_are_those_of_a_count_by_hand(whole):
    folder, _ = whole
    # Curriculum: 32 tokens until 0.38 of 32 steps, 12, counted from 1. Random-LTD: 32 until 0.7 of them, 22, from 0. One
    # layer of three drops.
    read = trained = layers = 0
    found = records(folder, RUNS[1])
    evaluations = {r["step"]: r for r in found if "val_loss" in r}
    for record in (r for r in found if "loss" in r):
        step = record["step"] - 1
        row = 64 if step + 1 >= 12 else 32
        kept = min(row, 64 if step >= 22 else 32)
        read, trained = read + 4 * 64, trained + 4 * row
        layers += 4 * ((2 * row + kept) // 3)
        assert record["tokens"] == layers
        if evaluation := evaluations.get(record["step"]):
            assert evaluation["tokens_read"] == read
            assert evaluation["tokens_trained"] == trained
            assert evaluation["layer_tokens"] == evaluation["val_tokens_seen"] == layers
    budget = 32 * 4 * 64
    assert budget <= layers < budget + 4 * 64
    assert sorted(evaluations) == [*range(8, record["step"], 8), record["step"]]
    results = json.loads((folder / "results.json").read_text())
    assert results["cl_ltd_100_tokens_read"] == read
    assert results["cl_ltd_100_tokens_trained"] == trained
    # At the baseline's 32 steps: 11 of 32 tokens, 11 of 64 of which one layer keeps 32, and 10 of 64.
    spent = 11 * 32 + 11 * ((64 + 64 + 32) // 3) + 10 * 64
    saved = results["cl_ltd_layer_tokens_saved_at_equal_steps"]
    assert saved == pytest.approx(1 - spent / (32 * 64))


def test_what_is_read_is_what_is_compared(whole):
    folder, _ = whole
    results = json.loads((folder / "results.json").read_text())
    final = json.loads((folder / RUNS[3] / "final.json").read_text())
    assert results["cl_ltd_50_val_loss"] == final["val_loss"]
    # On half of the budget the peak is the same, and comes after half of the steps.
    for run, warmup in ((RUNS[0], 4), (RUNS[1], 4), (RUNS[2], 2), (RUNS[3], 2)):
        rates = [r["learning_rate"] for r in records(folder, run) if "loss" in r]
        assert max(rates) == rates[warmup]
        assert rates[-1] < 0.3 * max(rates)


def arm(losses, shape_seconds, technique="none", steps=32):
    config = PRESETS["smoke"].pretraining(technique, 1.0)
    plan = make_plan(
        technique, config.efficiency, config.plan(512).model, steps=steps, batch_size=4, length=64
    )
    evaluations = [
        [{"step": step, "val_loss": loss} for step, loss in seed.items()] for seed in losses
    ]
    return report.Arm(
        plan=plan,
        evaluations=evaluations,
        step_seconds=[shape_seconds] * len(losses),
        final_loss=np.array([list(seed.values())[-1] if seed else np.nan for seed in losses]),
        wall_seconds=np.ones(len(losses)),
        num_compilations=1,
    )


def test_what_it_costs_to_reach_a_loss_is_interpolated():
    baseline = arm([{8: 6.0, 16: 5.0, 32: 4.0}, {8: 6.0, 16: 5.0, 32: 4.5}], {(64, 64): 0.5})
    times = {(32, 32): 0.1, (64, 32): 0.2, (64, 64): 0.5}
    both = arm([{8: 5.5, 16: 4.5, 40: 4.0}, {8: 5.5, 16: 4.5, 40: 4.0}], times, "cl_ltd")
    comparison = report.Comparison(arms={("none", 1.0): baseline, ("cl_ltd", 1.0): both})
    assert comparison.target == 4.25
    assert baseline.cost("seconds") == 16.0
    # From 4.5 at step 16 to 4.0 at step 40: half of the way. 11 steps of 0.1 s, 11 of 0.2 s, the rest of 0.5 s.
    first, last = 11 * 0.1 + 5 * 0.2, 11 * 0.1 + 11 * 0.2 + 18 * 0.5
    assert both.cost_of_reaching(4.25, "seconds") == pytest.approx((first + last) / 2)
    assert both.cost_of_reaching(5.8, "seconds") == pytest.approx(8 * 0.1)
    assert both.cost_of_reaching(3.9, "seconds") is None
    shares = comparison.shares_to_baseline(both)
    assert shares["seconds"] == pytest.approx((first + last) / 2 / 16)
    assert comparison.shares_to_baseline(baseline)["layer_tokens"] == 1.0
    assert comparison.figures()["cl_ltd_seconds_to_baseline"] == shares["seconds"]
    equal = comparison.saved_at_equal_steps(both)
    assert equal["seconds"] == pytest.approx(1 - (11 * 0.1 + 11 * 0.2 + 10 * 0.5) / 16)


def test_tokens_that_were_read_and_plain_training_on_less_are_compared_too():
    times = {(32, 32): 0.1, (64, 32): 0.2, (64, 64): 0.5}
    baseline = arm([{8: 6.0, 16: 5.0, 32: 4.0}], times)
    half = arm([{4: 5.0, 12: 3.0}], times, steps=12)  # its higher learning rate alone is faster
    both = arm([{8: 5.5, 24: 4.5, 40: 3.5}], times, "cl_ltd")
    arms = {("none", 1.0): baseline, ("none", 0.5): half, ("cl_ltd", 1.0): both}
    comparison = report.Comparison(arms=arms)
    figures = comparison.figures()
    assert figures["none_tokens_read_to_baseline"] == figures["none_seconds_to_baseline"] == 8 / 32
    # At step 32, half of the way from 24 to 40; 11 steps of 32 tokens were cut from rows of 64.
    assert figures["cl_ltd_tokens_read_to_baseline"] == pytest.approx(32 / 32)
    trained = 11 * 32 + 21 * 64
    assert figures["cl_ltd_tokens_trained_to_baseline"] == pytest.approx(trained / (32 * 64))
    assert figures["cl_ltd_tokens_read_saved_at_equal_steps"] == 0
    assert figures["cl_ltd_tokens_trained_saved_at_equal_steps"] == 1 - trained / (32 * 64)
    assert not any(name.startswith("none") and "saved_at" in name for name in figures)
    assert comparison.reach_rows()[2][:4] == ["plain training", "50 %", "25 %", "25 %"]


@pytest.mark.parametrize("technique", ["none", "cl_ltd"])
def test_an_arm_with_a_run_that_diverged_has_no_loss(technique, tmp_path):
    times = {(32, 32): 0.1, (64, 32): 0.2, (64, 64): 0.5}
    good = [{8: 6.0, 16: 4.0, 32: 3.0}, {8: 6.0, 16: 5.0, 32: 3.0}]
    broken = dataclasses.replace(
        arm([good[0], {8: 3.0}], times, technique), final_loss=np.array([3.0, np.nan])
    )
    other = "cl_ltd" if technique == "none" else "none"
    fine = arm(good, times, other)
    ended = arm([{}, {}], times, technique)  # both diverged before the first evaluation
    comparison = report.Comparison(
        arms={
            (technique, 1.0): broken,
            (technique, 0.5): ended,
            (other, 1.0): fine,
            (other, 0.5): fine,
        }
    )
    figures = comparison.figures()
    name = f"{technique}_100"
    assert [figures[f"{name}_{what}"] for what in ("val_loss", "seconds", "diverged")] == [
        *(None, None, 1)
    ]
    assert figures[f"{technique}_50_diverged"] == 2
    assert figures[f"{other}_100_val_loss"] == 3.0
    assert figures[f"{technique}_layer_tokens_to_baseline"] is None
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    row = ["diverged", "1 of 2 seeds", "n/a", "n/a"]
    assert comparison.loss_rows()[1][2:] == row
    assert comparison.reach_rows()[1][2:] == ["n/a"] * 5
    draw(tmp_path, comparison)
    assert (tmp_path / "curves.png").is_file()


def test_the_better_of_the_searched_pairs_is_taken(whole):
    folder, _ = whole
    results = json.loads((folder / "results.json").read_text())
    for technique in ("none", "cl_ltd"):
        places = [folder / run for run in SEARCHED if f"/{technique}/" in run]
        losses = [json.loads((p / "final.json").read_text())["val_loss"] for p in places]
        rate = (1e-2, 6.67e-3)[int(np.argmin(losses))]
        assert results[f"{technique}_learning_rate"] == rate
        assert results[f"{technique}_search_runs"] == 2
        peaks = [
            max(r["learning_rate"] for r in records(folder, run) if "learning_rate" in r)
            for run in (*(p.relative_to(folder) for p in places), f"{technique}/fraction-1/seed-0")
        ]
        np.testing.assert_allclose(peaks, [1e-2, 6.67e-3, rate], rtol=1e-5)


def test_a_run_that_diverges_is_recorded_and_the_others_go_on(tmp_path, capsys):
    runner = Runner.__new__(Runner)
    runner.config, runner.mesh = PRESETS["smoke"], jax.make_mesh((1,), ("data",))
    runner.corpus, runner._held_out = SimpleNamespace(train=None), None

    def train(batches, place, **options):
        place.mkdir(parents=True)  # as checkpoints do
        raise TrainingDivergedError(7, 10, None, "")

    config = PRESETS["smoke"].pretraining("none", 1.0)
    batches = lambda stores, seed: None
    training = Pretraining.__new__(Pretraining)
    training.config, training.mesh = config, runner.mesh
    training.train, training.batches = train, batches
    runner._trainings = {("none", 1.0): training}
    folder = RunFolder.create(tmp_path / "run")
    runner.run(folder, "none", 1.0, 0, Point(1e-3, 4))
    assert "none/fraction-1/seed-0 diverged at step 7" in capsys.readouterr().err
    place = folder.path / "none/fraction-1/seed-0"
    final = json.loads((place / "final.json").read_text())
    assert final == {"val_loss": None, "diverged": True}
    training.train = None  # what is done is not made again
    runner.run(folder, "none", 1.0, 0, Point(1e-3, 4))


def test_tables_fit_a_terminal_of_100_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    times = {(32, 32): 123.4, (64, 32): 123.4, (64, 64): 123.4}
    arms = {(name, 1.0): arm([{8: 16.0, 32: 14.0}] * 2, times, name) for name in ("none", "cl_ltd")}
    for title, rows in report.tables(report.Comparison(arms=arms)).items():
        show_rows(title, rows, left=2)
    shown = capsys.readouterr().out
    for heading in ("tokens read", "tokens trained", "layer tokens", "operations", "seconds"):
        assert f" {heading} " in shown


def test_seconds_of_a_step_are_medians_by_shape(tmp_path):
    plan = arm([{32: 4.0}], {}, "cl_ltd").plan
    file = tmp_path / "timing.jsonl"
    # Steps count from 1 in records. Layer-averaged tokens of a batch: 128, 212 and 256.
    speeds = {3: 128 / 0.1, 4: 128 / 0.1, 5: 128 / 9.0, 25: 256 / 0.5, 26: 256 / 0.3}
    lines = [{"step": step, "tokens_per_second": speed} for step, speed in speeds.items()]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    seconds = report.step_seconds(file, plan)
    assert seconds[32, 32] == pytest.approx(0.1)
    assert seconds[64, 64] == pytest.approx(0.4)
    assert seconds[64, 32] == pytest.approx(0.1 + 0.3 * (212 - 128) / (256 - 128))
    assert set(report.step_seconds(tmp_path / "none.jsonl", plan).values()) == {0.0}


@pytest.mark.slow  # what every experiment shares is killed and resumed in test_pretraining and test_quickstart_resume
def test_killed_and_stopped_runs_go_on_exactly(start, small, whole, tmp_path):
    out = tmp_path / "run"
    folder, _ = whole
    done = start(PROGRAM, "kill:5:15", *small, "--out", out)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (out / RUNS[0] / "done.json").is_file()
    before = (out / RUNS[0] / "metrics.jsonl").stat().st_mtime_ns
    # Run 0 of this call is the one that was killed.
    done = start(PROGRAM, "done:0:0", "--out", out, "--resume")
    assert done.returncode == -signal.SIGKILL, done.stderr
    done = start(PROGRAM, "term:1:5", "--out", out, "--resume")
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert (
        f"stopped and saved {RUNS[2]} at step 6; to resume, use --out {out} --resume" in done.stderr
    )
    assert not (out / "results.json").exists()
    done = start("-m", "effscale.experiments.data_efficiency", "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    for run in (*SEARCHED, *RUNS):
        ours, theirs = ((place / run / "metrics.jsonl").read_bytes() for place in (out, folder))
        assert ours == theirs
    assert (out / RUNS[0] / "metrics.jsonl").stat().st_mtime_ns == before
    timed = ("seconds", "peak_memory_mb", "compilation", "folder", "to_baseline", "saved", "tables")
    results = [json.loads((place / "results.json").read_text()) for place in (out, folder)]
    for name in results[0]:
        if not any(part in name for part in timed):
            assert results[0][name] == results[1][name], name


def test_a_finished_run_is_kept_and_another_config_refused(small, whole, tmp_path, capsys):
    folder, _ = whole
    with pytest.raises(SystemExit) as stop:
        main([*small, "--batch-size", "8", "--out", str(folder)])  # eight devices are here
    assert stop.value.code == 2
    assert "already contains a run. Choose another folder, or resume" in capsys.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(copy), "--resume", "--batch-size", "8"])
    assert stop.value.code == 2
    assert "has another config (batch_size: 4 saved, 8 given)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "smok"], "--preset 'smok': did you mean 'smoke'?"),
        (["--techniques", "cl", "ltd"], "must be none and other techniques to compare with it"),
        (["--techniques", "none", "lt"], "invalid choice 'lt'"),
        (["--fractions", "1.0", "1.5"], "must be numbers above 0, at most 1"),
        (["--fractions", "1.0", "0"], "must be numbers above 0, at most 1"),
        (["--fractions", "0.5"], "must be 1.0 and other fractions to compare with it"),
        (["--fractions", "1.0", "1.0"], "must be different values"),
        (["--seeds", "0"], "Config.seeds must be at least 1, got 0"),
        (["--model.num-layers", "2"], "leaves none of 2. Use a model with at least 3 layers"),
        (
            ["--efficiency.min-length", "512"],
            "min_length must be at most the length of a row, 256, got 512",
        ),
        (
            ["--efficiency.min-kept", "257"],
            "min_kept must be at most the length of a row, 256, got 257",
        ),
        (["--efficiency.curriculum", "1.2"], "curriculum must be above 0, at most 1, got 1.2"),
        (["--warmup", "400"], "warmup must be from 0 to below steps=400, got 400"),
        (
            ["--search.seed", "2"],
            "Search.seed must be at least seeds=3, so that no compared run uses it, got 2",
        ),
        (["--search.learning-rate-factor", "1"], "learning_rate_factor must be above 1, got 1.0"),
        (["--evaluations", "500"], "evaluations must be from 1 to steps=400, got 500"),
        (["--resume"], "set together with --out"),
        (["--batch-size", "12"], "a global batch of 12 rows cannot be divided over 8 devices"),
        (["--corpus", "txt:a.txt"], "Did you mean 'text'?"),
        (["--corpus", "2*stdlib"], "corpus must have one of the forms stdlib"),
        (["--out", "absent", "--resume"], "absent: does not exist. Run without resume"),
    ],
)
def test_a_wrong_option_is_answered_with_what_would_do(
    words, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        main([*words, "--cache", str(tmp_path / "cache")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("runs*"))


def test_help_is_quick_because_it_imports_little(shown_by_help):
    heavy = ("matplotlib", "orbax", "grain", "tensorboardX", "tokenizers", "pyarrow", "torch")
    text = shown_by_help("data_efficiency", heavy)
    for shown in ("smoke, default, paper", "--efficiency.min-length", "Techniques to compare"):
        assert shown in text


def test_configs_come_back_from_json():
    from effscale.training.serialize import to_json

    for config in PRESETS.values():
        assert config_from_json(type(config), to_json(config)) == config


def test_the_paper_preset_is_gpt3_and_lowers():
    from effscale.experiments.aot import lower_train_step
    from effscale.models import num_params, preset

    paper = PRESETS["paper"]
    both = paper.pretraining("cl_ltd", 1.0)
    built = both.model.build(both.vocab_size, both.length)
    assert num_params(built) == num_params(preset("gpt3-1.3b"))
    assert paper.steps == 300_000_000_000 // (512 * 2048)
    lowered = lower_train_step(both, paper.mesh, jax.devices(), (1152, 768))
    _, batch = lowered.args_info[0]
    assert batch["input_ids"].shape == (512, 1152)
    assert batch["kept_tokens"].kept == 768
    with pytest.raises(
        ValueError, match=r"shape must be one of the stages' shapes, .* got \(1152, 1152\)"
    ):
        lower_train_step(both, paper.mesh, jax.devices(), (1152, 1152))
