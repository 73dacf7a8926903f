"""A run that is killed again and again writes what a run that never stopped writes, bit for bit."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest


def run(script, folder, kill="never:0", expect=0):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "default"}
    done = subprocess.run(
        [sys.executable, str(script), str(folder), "--kill", kill],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == expect, done.stderr[-3000:]
    return done.stdout.split("\n")


@pytest.fixture(scope="module")
def uninterrupted(toy_script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert run(toy_script, folder)[:2] == ["start 0", "stopped finished 24"]
    return folder


def test_killed_at_many_moments(toy_script, uninterrupted, tmp_path):
    killed = -signal.SIGKILL
    # Between checkpoints; the steps since the last one are done again.
    assert run(toy_script, tmp_path, "step:8", killed)[0] == "start 0"
    # While the arrays of a checkpoint are being written: the one before counts.
    assert run(toy_script, tmp_path, "write:10", killed)[0] == "start 5"
    assert list((tmp_path / "checkpoints").glob("*tmp*"))
    # After the arrays were written and before the checksums, which are what counts.
    assert run(toy_script, tmp_path, "manifest:15", killed)[0] == "start 5"
    # A scheduler's warning: saved at once, at a step that is no multiple of the interval.
    assert run(toy_script, tmp_path, "term:12")[:2] == ["start 10", "stopped signal 13"]
    assert run(toy_script, tmp_path)[:2] == ["start 13", "stopped finished 24"]

    whole, pieces = (folder / "metrics.jsonl" for folder in (uninterrupted, tmp_path))
    assert whole.read_bytes() == pieces.read_bytes()
    assert len(whole.read_bytes().splitlines()) == 24 + 4
    with np.load(uninterrupted / "final.npz") as expected, np.load(tmp_path / "final.npz") as found:
        assert expected.files == found.files
        for name in expected.files:
            np.testing.assert_array_equal(expected[name], found[name])
    # What was half-written is gone, and no more is kept than asked for.
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step_00000020",
        "step_00000024",
    ]
