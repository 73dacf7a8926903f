"""Two processes over loopback: one is told to stop, both save, and the run goes on as one process would have run it."""

import json
import pathlib
import sys

import numpy as np

from effscale.parallel.local_launch import launch_local
from effscale.training import read_jsonl

SCRIPT = pathlib.Path(__file__).with_name("two_processes_run.py")


def run(folder, num_processes, num_steps, signal_at=-1):
    argv = [sys.executable, str(SCRIPT), str(folder), str(num_steps), str(signal_at)]
    results = launch_local(argv, num_processes, 2 // num_processes, timeout=300)
    lines = [
        line
        for result in results
        for line in result.stdout.splitlines()
        if line.startswith("report")
    ]
    return [json.loads(line.removeprefix("report ")) for line in lines]


def test_two_processes_stop_together_and_resume(tmp_path):
    stopped = {"start": 0, "step": 8, "reason": "signal", "compilations": 1, "checkpoints": [6, 8]}
    assert run(tmp_path / "two", 2, 12, signal_at=5) == [stopped, stopped]
    ended = {
        "start": 8,
        "step": 12,
        "reason": "finished",
        "compilations": 1,
        "checkpoints": [9, 12],
    }
    assert run(tmp_path / "two", 2, 12) == [ended, ended]
    assert run(tmp_path / "one", 1, 12)[0]["reason"] == "finished"
    losses = [
        [record["loss"] for record in read_jsonl(tmp_path / name / "metrics.jsonl")]
        for name in ("two", "one")
    ]
    assert len(losses[0]) == 12
    np.testing.assert_allclose(*losses, rtol=1e-5)
