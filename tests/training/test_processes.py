"""Several processes over loopback: stopped or killed, and gone on with by as many, by fewer, and by one."""

import collections
import functools
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from effscale.parallel import MeshConfig, shard_batch, shardings
from effscale.training import (
    AdamWConfig,
    Checkpoints,
    create_train_state,
    fit,
    make_train_step,
    read_jsonl,
    resume_or_start,
)
from tests.parallel.local_launch import LaunchError, launch_local

SCRIPT = pathlib.Path(__file__).with_name("processes_run.py")


def run(folder, num_steps, stop="never:-1", processes=2):
    """The reports of the processes, and the numbers of the rows that each read at each step."""
    argv = [sys.executable, str(SCRIPT), str(folder), str(num_steps), stop]
    try:
        results = launch_local(argv, num_processes=processes, timeout=300)
    except LaunchError as error:
        if not stop.startswith("kill"):
            raise
        results = error.results
    said = collections.defaultdict(list)
    for result in results:
        for line in result.stdout.splitlines():
            kind, _, value = line.partition(" ")
            if kind in ("report", "read"):
                said[kind].append(json.loads(value))
    return said["report"], said["read"]


@pytest.fixture(scope="module")
def alone(toy):
    """The losses of twelve steps of one process on one device, which never stops, and what it reads."""
    optimizer, rows = AdamWConfig().build(1e-2), []
    state = create_train_state(toy.Toy(rngs=nnx.Rngs(0)), optimizer, key=jax.random.key(0))
    step = jax.jit(make_train_step(toy.loss_fn, optimizer, accumulate=2))

    def before_step(step, batch):
        rows.append(batch.pop("row").tolist())
        return batch

    result = fit(state, step, toy.numbered_batches(), num_steps=12, before_step=before_step)
    return [record["loss"] for record in result.history], rows


def test_two_processes_stop_together_and_resume(toy, alone, tmp_path):
    stopped = {"start": 0, "step": 8, "reason": "signal", "compilations": 1, "checkpoints": [6, 8]}
    assert run(tmp_path, 12, "term:5")[0] == [stopped, stopped]
    ended = {
        "start": 8,
        "step": 12,
        "reason": "finished",
        "compilations": 1,
        "checkpoints": [9, 12],
    }
    assert run(tmp_path, 12)[0] == [ended, ended]

    together = read_jsonl(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in together] == list(range(1, 13))
    np.testing.assert_allclose([record["loss"] for record in together], alone[0], rtol=1e-5)

    # One process takes over where the two stood in the data.
    state = create_train_state(
        toy.Toy(rngs=nnx.Rngs(0)), AdamWConfig().build(1e-2), key=jax.random.key(0)
    )
    data, consumed = toy.numbered_batches(), toy.numbered_batches()
    for _ in range(12):
        next(consumed)
    restored = Checkpoints(tmp_path / "checkpoints").restore(state, data)
    assert restored.step == 12
    assert data.get_state() == consumed.get_state()


@pytest.mark.slow  # test_fewer_devices_and_readers_take_over, below, is quick
def test_four_processes_are_killed_and_two_go_on_and_then_one(alone, tmp_path):
    losses, rows = alone
    read = {}

    def keep(parts, first, until):
        """What counts: the rows of the steps up to the checkpoint from which the next run goes on."""
        for step in range(first, until + 1):
            read[step] = [row for part in parts for row in part[str(step)]]

    reports, parts = run(tmp_path, 12, "kill:7", processes=4)  # the checkpoint of step 6 is there
    assert (reports, len(parts)) == ([], 4)
    assert {len(part["1"]) for part in parts} == {2}
    keep(parts, 1, 6)
    reports, parts = run(tmp_path, 12, "term:6", processes=2)
    assert [(report["start"], report["step"]) for report in reports] == [(6, 8)] * 2
    keep(parts, 7, 8)
    reports, parts = run(tmp_path, 12, processes=1)
    assert [(report["start"], report["step"]) for report in reports] == [(8, 12)]
    keep(parts, 9, 12)

    assert [read[step] for step in range(1, 13)] == rows
    assert sorted(row for step in range(1, 9) for row in read[step]) == list(range(64))  # an epoch
    together = read_jsonl(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in together] == list(range(1, 13))
    np.testing.assert_allclose([record["loss"] for record in together], losses, rtol=1e-5)


class Readers:
    """The readers of so many processes as one iterator of global batches, and the position of one of them."""

    def __init__(self, toy, count):
        self.readers = [toy.numbered_batches(index, count) for index in range(count)]
        self.rows = []

    def __iter__(self):
        return self

    def __next__(self):
        parts = [next(reader) for reader in self.readers]
        batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        self.rows.append(batch.pop("row").tolist())
        return batch

    def get_state(self):
        first, *others = [reader.get_state() for reader in self.readers]
        assert all(other == first for other in others)
        return first

    def set_state(self, state):
        for reader in self.readers:
            reader.set_state(state)


def test_fewer_devices_and_readers_take_over(toy, alone, tmp_path):
    optimizer = AdamWConfig().build(1e-2)
    create = lambda: create_train_state(toy.Toy(rngs=nnx.Rngs(0)), optimizer, key=jax.random.key(0))
    losses, rows = [], []
    for count, until in ((4, 6), (2, 12)):
        mesh = MeshConfig().build(jax.devices()[:count])
        data = Readers(toy, count)
        places = shardings(jax.eval_shape(create), mesh)
        checkpoints = Checkpoints(tmp_path)
        state, _ = resume_or_start(checkpoints, create, data, shardings=places)
        result = fit(
            state,
            jax.jit(make_train_step(toy.loss_fn, optimizer, accumulate=2)),
            data,
            num_steps=until,
            checkpoints=checkpoints,
            place_batch=functools.partial(shard_batch, mesh=mesh),
        )
        losses += [record["loss"] for record in result.history]
        rows += data.rows
        assert len(rows) == until
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    assert rows == alone[1]
