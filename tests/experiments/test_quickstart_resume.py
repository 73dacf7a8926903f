"""A quickstart run that is killed again and again ends with the files of one that never stopped."""

import json
import pathlib
import signal
import sys

import numpy as np
import pytest

PROGRAM = pathlib.Path(__file__).with_name("quickstart_killed.py")
SHORT = ["--steps", "14", "--eval-every", "4", "--samples"]


@pytest.fixture(scope="module")
def whole(start, options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = start("-m", "effscale.experiments.quickstart", *options, *SHORT, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow  # tests/training/test_resume.py kills a smaller run
def test_killed_at_many_moments(start, options, whole, tmp_path):
    out = tmp_path / "run"
    killed = -signal.SIGKILL

    def run(moment, *words):
        done = start(PROGRAM, moment, *words, "--out", out)
        return done.returncode, sorted(path.name for path in (out / "checkpoints").glob("*")), done

    status, _, done = run("step:5", *options, *SHORT)
    assert status == killed, done.stderr
    # From here on --out and --resume are enough: the other options are the saved ones. (Killed in the middle of
    # a checkpoint: tests/training/test_resume.py.)
    status, _, done = run("term:10", "--resume")
    assert status == 128 + signal.SIGTERM, done.stderr
    assert f"at step 11; to resume, use --out {out} --resume" in done.stderr
    assert not (out / "results.json").exists()
    status, _, done = run("sample", "--resume")
    assert status == killed, done.stderr
    status, there, done = run("none", "--resume")
    assert status == 0, done.stderr
    assert there == ["step_00000011", "step_00000012", "step_00000014"]

    metrics = [(folder / "metrics.jsonl").read_bytes() for folder in (whole, out)]
    assert metrics[0] == metrics[1]
    assert len(metrics[0].splitlines()) == 14 + 4
    measured = ("val_loss", "unigram_entropy", "train_loss", "tokens_seen", "num_params")
    results = [json.loads((folder / "results.json").read_text()) for folder in (whole, out)]
    assert [results[0][name] for name in measured] == [results[1][name] for name in measured]


@pytest.mark.slow  # tests/parallel/test_curves.py compares smaller runs
def test_two_processes_give_the_curve_of_one(start, options, whole, tmp_path):
    out = tmp_path / "run"
    launcher = ("-m", "tests.parallel.local_launch", "--processes", "2", "--devices", "1", "--")
    program = ("-m", "effscale.experiments.quickstart", *options, *SHORT, "--mesh.fsdp", "2")
    done = start(*launcher, sys.executable, *program, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [
        [
            record.get("loss", record.get("part_val_loss"))
            for record in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        ]
        for folder in (whole, out)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
