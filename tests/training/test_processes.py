"""Two processes over loopback: one is told to stop, both save, and the run goes on as one process would have run it."""

import json
import pathlib
import sys

import jax
import numpy as np
from flax import nnx

from effscale.parallel.local_launch import launch_local
from effscale.training import (
    AdamWConfig,
    Checkpoints,
    create_train_state,
    fit,
    make_train_step,
    read_jsonl,
)

SCRIPT = pathlib.Path(__file__).with_name("two_processes_run.py")


def run(folder, num_steps, signal_at=-1):
    argv = [sys.executable, str(SCRIPT), str(folder), str(num_steps), str(signal_at)]
    results = launch_local(argv, num_processes=2, timeout=300)
    lines = [
        line
        for result in results
        for line in result.stdout.splitlines()
        if line.startswith("report")
    ]
    return [json.loads(line.removeprefix("report ")) for line in lines]


def test_two_processes_stop_together_and_resume(toy, tmp_path):
    stopped = {"start": 0, "step": 8, "reason": "signal", "compilations": 1, "checkpoints": [6, 8]}
    assert run(tmp_path, 12, signal_at=5) == [stopped, stopped]
    ended = {
        "start": 8,
        "step": 12,
        "reason": "finished",
        "compilations": 1,
        "checkpoints": [9, 12],
    }
    assert run(tmp_path, 12) == [ended, ended]

    optimizer = AdamWConfig().build(1e-2)
    state = create_train_state(toy.Toy(rngs=nnx.Rngs(0)), optimizer, key=jax.random.key(0))
    step = jax.jit(make_train_step(toy.loss_fn, optimizer, accumulate=2))
    alone = fit(state, step, toy.batches(), num_steps=12).history
    together = read_jsonl(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in together] == list(range(1, 13))
    np.testing.assert_allclose(
        [record["loss"] for record in together], [record["loss"] for record in alone], rtol=1e-5
    )

    # One process takes over where the two stood in the data.
    data, consumed = toy.batches(), toy.batches()
    for _ in range(12):
        next(consumed)
    restored = Checkpoints(tmp_path / "checkpoints").restore(state, data)
    assert restored.step == 12
    assert data.get_state() == consumed.get_state()
