"""A study, on toys: the table, intervals, the search, stops and resumes, jobs, and what is refused."""

import dataclasses
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effscale.command.line import parse
from effscale.run import Run
from effscale.study import Arm, Curves, Finals, Point, Search, Study, Tradeoff, interval
from effscale.study.command import conduct
from effscale.study.folder import StudyPart
from effscale.study.table import Table
from effscale.training import Evaluation, Loss
from effscale.training.errors import StoppedBySignal

X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
BATCH = {"x": X, "y": X @ np.array([1, -2, 3, 0.5], np.float32)}


def squares(model, batch, key):
    error = jnp.square(batch["x"] @ model - batch["y"])
    return Loss(error.sum(), jnp.float32(error.size))


def batches(stop_at, seed):
    for number in range(20):
        if number == 3 and stop_at == f"seed-{seed}":
            os.kill(os.getpid(), signal.SIGTERM)
        yield BATCH


def run_of(rate, steps=6, stop_at=None):
    return Run(
        model=jnp.zeros(4),
        data=functools.partial(batches, stop_at),
        loss=squares,
        optimizer=optax.adam(rate),
        num_steps=steps,
        evaluation=Evaluation(data=[BATCH], loss=squares, every=2),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(StudyPart):
    """A toy."""

    rate: float = 0.1
    """The learning rate."""
    stop_at: str | None = None
    """Where a signal comes."""


def toy(config):
    """Two runs, and a trial of two parts that needs the model of the first."""
    slow, fast = run_of(config.rate), run_of(4 * config.rate, stop_at=config.stop_at)

    def tuned(trial):
        start = trial.model(slow, arm="slow")
        return trial.fit(fast, "second", model=start) | {"start": float(start[0])}

    def slowly(trial):
        return trial.fit(slow, keep_model=True)

    return Study(
        name="toy",
        data={"batch": "digest"},
        baseline="slow",
        arms={
            "slow": Arm(about="slow", train=slowly),
            "fast": Arm(about="fast", train=fast),
            "tuned": Arm(about="slow, then fast", train=tuned, needs=("slow",), against="fast"),
        },
        pairs=(("tuned", "slow", "more steps"),),
        plots=(
            Curves(name="curves", metric="val_loss"),
            Curves(name="minus", metric="val_loss", minus=True, over="step_seconds"),
            Finals(name="finals"),
            Tradeoff(name="costs", over="updates", logarithmic=True),
        ),
        figures=lambda results: {"arms": float(len(results.study.arms))},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "whole"
    conduct(Config(out=folder, seeds=2), toy)
    return folder


def test_table_results_and_figures(finished):
    table = Table.read(finished / "table.csv")
    assert {row.arm for row in table.rows} == {"slow", "fast", "tuned"}
    losses = table.values("slow", "val_loss")
    written = json.loads((finished / "slow/seed-1/metrics.jsonl").read_text().splitlines()[-1])
    assert losses[1] == written["val_loss"]
    assert table.values("tuned", "updates") == {0: 6, 1: 6}
    assert table.interval("fast", "val_loss").mean < table.interval("slow", "val_loss").mean
    results = json.loads((finished / "results.json").read_text())
    assert results["arms"] == 3
    assert results["slow_val_loss"] == np.mean(list(losses.values()))
    change = table.difference("tuned", "fast", "val_loss").mean
    assert results["tuned_val_loss_difference"] == change
    assert {title["title"] for title in results["tables"]} == {"Arms", "Pairs"}
    for name in ("curves", "minus", "finals", "costs"):
        assert (finished / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(finished.glob("*/seed-*/checkpoints"))


@pytest.mark.exact
def test_a_stopped_study_continues_bit_for_bit(finished, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(StoppedBySignal, match=f"use --out {out} --resume"):
        conduct(Config(out=out, seeds=2, stop_at="seed-1"), toy)
    assert not (out / "results.json").exists()
    with pytest.raises(
        ValueError, match=r"has another config .*stop_at: 'seed-1' saved, None given"
    ):
        conduct(Config(out=out, seeds=2, resume=True), toy)
    fixed = json.loads((out / "config.json").read_text())
    fixed["config"]["stop_at"] = None
    (out / "config.json").write_text(json.dumps(fixed))
    conduct(Config(out=out, seeds=2, resume=True), toy)
    for path in sorted(finished.glob("*/seed-*/**/metrics.jsonl")):
        assert (out / path.relative_to(finished)).read_bytes() == path.read_bytes()


def test_a_killed_study_continues(finished, tmp_path):
    """Killed without warning while it writes; what is finished is not trained again."""
    out = tmp_path / "run"
    program = (
        "import os, sys, pathlib; sys.path.insert(0, sys.argv[1])\n"
        "import test_study as t\n"
        "from effscale.training import run_folder\n"
        "write = run_folder.write_json\n"
        "def dying(path, value):\n"
        "    if path.parts[-3:-1] == ('fast', 'seed-1'): os._exit(9)\n"
        "    write(path, value)\n"
        "run_folder.write_json = dying\n"
        "t.conduct(t.Config(out=pathlib.Path(sys.argv[2]), seeds=2), t.toy)\n"
    )
    here = str(pathlib.Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", program, here, str(out)], check=False)
    assert done.returncode == 9
    before = (out / "fast/seed-0/trial.json").stat().st_mtime_ns
    conduct(Config(out=out, seeds=2, resume=True), toy)
    assert (out / "fast/seed-0/trial.json").stat().st_mtime_ns == before
    found = [
        Table.read(folder / "table.csv").values("fast", "val_loss") for folder in (out, finished)
    ]
    assert found[0].keys() == found[1].keys()
    np.testing.assert_allclose([*found[0].values()], [*found[1].values()], rtol=1e-6)


def test_another_seed_is_added_on_resume(finished, tmp_path):
    out = tmp_path / "run"
    conduct(Config(out=out, seeds=1, arms=("slow",)), toy)
    conduct(Config(out=out, seeds=2, arms=("slow", "fast"), resume=True), toy)
    assert set(Table.read(out / "table.csv").values("fast", "val_loss")) == {0, 1}


def doubled(trial):
    return {"val_loss": 2.0 * trial.seed + len(os.sched_getaffinity(0)), "process": os.getpid()}


def in_jobs():
    arms = {name: Arm(about=name, train=doubled) for name in "abc"}
    arms["d"] = Arm(about="d", train=doubled, needs=("a", "b"))
    return Study(name="jobs", baseline="a", arms=arms)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs affinities of processes")
def test_jobs_are_pinned_processes(tmp_path):
    assert in_jobs().groups() == [["c"], ["a", "b", "d"]]
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_study as t\n"
        "t.in_jobs().train(sys.argv[2], seeds=2, jobs=2, again=t.in_jobs).table.write(sys.argv[2] + '/t.csv')\n"
    )
    here = str(pathlib.Path(__file__).parent)
    subprocess.run([sys.executable, "-c", program, here, str(tmp_path)], check=True)
    table = Table.read(tmp_path / "t.csv")
    processes = {row.value for row in table.rows if row.metric == "process"}
    assert os.getpid() not in processes
    cores = len(os.sched_getaffinity(0))
    assert table.values("c", "val_loss")[1] - 2.0 <= max(1, (cores + 1) // 2)


def test_a_search_has_its_own_seed_and_is_counted(tmp_path):
    seen = []

    def train(trial):
        seen.append((trial.seed, trial.tuning))
        return {"val_loss": abs(np.log2(trial.point.learning_rate / 0.4))}

    search = Search(learning_rate_factor=2.0, warmup_factor=None, points=9)
    start = Point(0.1, 10)
    arms = {
        "plain": Arm(about="plain", train=train, start=start),
        "half": Arm(about="half", train=train, point_of="plain"),
    }
    results = Study(name="s", arms=arms, baseline="plain", search=search).train(tmp_path, seeds=2)
    found = results.found["plain"]
    assert found.best == Point(0.4, 10)
    assert found.settled
    assert seen == [(1000, True)] * len(found.losses) + [(0, False), (1, False)] * 2
    assert results.table.values("half", "val_loss") == {0: 0.0, 1: 0.0}
    with pytest.raises(ValueError, match=r"Search.seed must be at least seeds=2000.*got 1000"):
        Study(name="s", arms=arms, baseline="plain", search=search).train(tmp_path, seeds=2000)


def test_a_run_that_diverges_is_a_result(tmp_path):
    arms = {
        "plain": Arm(about="plain", train=run_of(0.1)),
        "wild": Arm(about="wild", train=run_of(1.0)),
    }
    wild = dataclasses.replace(run_of(0.1, 20), optimizer=optax.sgd(1e30))
    arms["wild"] = Arm(about="wild", train=wild)
    table = Study(name="s", arms=arms, baseline="plain").train(tmp_path, seeds=1).table
    assert np.isnan(table.values("wild", "val_loss")[0])
    assert table.values("wild", "diverged") == {0: 1.0}
    assert np.isfinite(table.values("plain", "val_loss")[0])


def test_intervals_cover_the_mean_as_often_as_they_say():
    """Of 2,000 samples of five values, 95 % of the intervals contain the mean of the distribution."""
    samples = np.random.default_rng(0).normal(3.0, 2.0, (2000, 5))
    inside = [low <= 3.0 <= high for _, low, high in map(interval, samples)]
    assert 0.935 < np.mean(inside) < 0.965


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0"], "Config.seeds must be at least 1, got 0"),
        (["--resume"], "must be set together with --out"),
    ],
)
def test_a_wrong_option_is_answered_with_what_would_do(words, message, capsys):
    with pytest.raises(SystemExit):
        parse({"default": Config()}, "A toy.", words)
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_arms_are_chosen_in_the_order_of_the_study():
    study = toy(Config())
    assert list(study.only(("tuned", "slow")).arms) == ["slow", "tuned"]
    with pytest.raises(ValueError, match="needs, before it, got tuned"):
        study.only(("tuned",))
    with pytest.raises(
        ValueError, match="arms must be arms of toy, got 'fats': did you mean 'fast'"
    ):
        study.only(("fats",))


def test_a_damaged_table_is_named(tmp_path):
    (tmp_path / "table.csv").write_text("arm,seed,metric,value\nplain,0,val_loss,x\n")
    with pytest.raises(ValueError, match=r"table.csv: is damaged"):
        Table.read(tmp_path / "table.csv")
    (tmp_path / "table.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="must begin with the heading arm,seed,metric,value"):
        Table.read(tmp_path / "table.csv")


def test_an_arm_may_have_seeds_of_its_own(tmp_path):
    arm = Arm(about="an arm", train=lambda trial: {"val_loss": float(trial.seed)})
    more = dataclasses.replace(arm, seeds=3)
    study = Study(name="seeds", baseline="few", arms={"few": arm, "more": more})
    table = study.train(tmp_path, seeds=1).table
    assert table.values("few", "val_loss") == {0: 0.0}
    assert table.values("more", "val_loss") == {0: 0.0, 1: 1.0, 2: 2.0}
    with pytest.raises(ValueError, match="seed must be at least seeds=3"):
        dataclasses.replace(study, search=Search(seed=2)).train(tmp_path, seeds=1)
