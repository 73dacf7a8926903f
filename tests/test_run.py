"""A run: a user's own model trains, resumes bit for bit, is refused as another run, and lowers for a mesh."""

import dataclasses
import os
import signal

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effscale.ltd import RandomLTD, mslg
from effscale.models import gpt2
from effscale.optim import Workers, onebit_adam
from effscale.parallel import MeshConfig
from effscale.run import Run
from effscale.training import (
    AdamWConfig,
    CheckpointError,
    Evaluation,
    Loss,
    Stages,
    TrainingDivergedError,
    next_token_loss,
    read_jsonl,
)
from effscale.training.errors import StoppedBySignal
from effscale.training.staged import Changes

X = np.random.default_rng(0).normal(size=(30, 8, 4)).astype(np.float32)
BATCHES = [{"x": x, "y": x @ np.array([1, -2, 3, 0.5], np.float32)} for x in X]


def squares(predict):
    def loss(model, batch, key):
        error = jnp.square(predict(model, batch["x"]) - batch["y"])
        return Loss(error.sum(), jnp.float32(error.size))

    return loss


DENSE = linen.Dense(1)
OWN = {
    "pytree": ({"w": jnp.zeros(4)}, squares(lambda model, x: x @ model["w"])),
    "linen": (
        lambda key: DENSE.init(key, X[0]),
        squares(lambda model, x: DENSE.apply(model, x)[:, 0]),
    ),
    "nnx": (
        lambda key: nnx.Linear(4, 1, rngs=nnx.Rngs(key)),
        squares(lambda model, x: model(x)[:, 0]),
    ),
}


def run_of(kind="pytree", **options):
    model, loss = OWN[kind]
    given = {"data": BATCHES, "num_steps": 12, "optimizer": optax.adam(0.1)} | options
    return Run(model=model, loss=loss, **given)


@pytest.mark.parametrize("kind", OWN)
def test_own_models_train(kind, tmp_path):
    run = run_of(kind, evaluation=Evaluation(data=BATCHES[20:], loss=OWN[kind][1], every=4))
    trained = run.fit(tmp_path / "run", quiet=True)
    losses = [r["val_loss"] for r in read_jsonl(tmp_path / "run/metrics.jsonl") if "val_loss" in r]
    assert len(losses) == 3
    assert losses[2] < losses[1] < losses[0]
    assert trained.metrics["val_loss"] == losses[-1]
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert written >= {"config.json", "metrics.jsonl", "results.json", "report.md", "figures"}


def stopping(run, step):
    """The run, stopped by SIGTERM before a step."""

    def data(seed):
        for number, batch in enumerate(BATCHES):
            if number == step:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    data.__module__, data.__qualname__ = "own", "data"
    return dataclasses.replace(run, data=data)


@pytest.mark.exact
def test_a_stopped_run_continues_bit_for_bit(tmp_path):
    """Also batches whose iterator has no position of its own, and a schedule of shapes."""
    changes = Changes(
        Stages((0, 4, 8), (2, 4, 8)), lambda batch, rows: jax.tree.map(lambda x: x[:rows], batch)
    )
    run = stopping(run_of("nnx", changes=changes), -1)
    run.fit(tmp_path / "whole", seed=3, quiet=True)
    with pytest.raises(StoppedBySignal, match="at step 7"):
        stopping(run, 6).fit(tmp_path / "stopped", seed=3, quiet=True)
    run.fit(tmp_path / "stopped", seed=3, resume=True, quiet=True)
    files = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "stopped")]
    assert files[0] == files[1]
    assert len(files[0].splitlines()) == 12


def test_another_run_is_refused(tmp_path):
    run = run_of(num_steps=2)
    run.fit(tmp_path / "run", quiet=True)
    with pytest.raises(FileExistsError, match="already contains a run"):
        run.fit(tmp_path / "run", quiet=True)
    for changed, named in ({"accumulate": 2}, "accumulate: 1"), ({"num_steps": 3}, "num_steps: 2"):
        with pytest.raises(CheckpointError, match=named):
            run_of(**{"num_steps": 2} | changed).fit(tmp_path / "run", resume=True, quiet=True)
    with pytest.raises(CheckpointError, match="seed: 0"):
        run.fit(tmp_path / "run", seed=1, resume=True, quiet=True)


def test_the_last_metrics_of_a_run_that_diverges_are_written(tmp_path):
    run = run_of(optimizer=optax.sgd(1e30), num_steps=30)
    with pytest.raises(TrainingDivergedError):
        run.fit(tmp_path / "run", quiet=True)
    assert read_jsonl(tmp_path / "run/metrics.jsonl")[-1]["skipped_in_row"] == 10


def rows(seed):
    ids = np.random.default_rng(seed).integers(0, 32, (8, 9), np.int32)
    while True:
        yield {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


GPT = gpt2(num_layers=1, d_model=16, num_heads=2, vocab_size=32, max_length=8)


def test_a_mesh_trains_the_same(tmp_path):
    run = Run(model=GPT, data=rows, num_steps=3)
    one = run.fit(tmp_path / "one", quiet=True)
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    eight = dataclasses.replace(run, mesh=mesh).fit(tmp_path / "eight", quiet=True)
    np.testing.assert_allclose(one.metrics["loss"], eight.metrics["loss"], rtol=1e-5)
    assert one.metrics["learning_rate"] == eight.metrics["learning_rate"]


def test_workers_on_one_device_train_as_on_a_mesh(tmp_path):
    """1-bit Adam with four workers."""

    def run(workers, mesh):
        optimizer = onebit_adam(1e-2, freeze_step=2, workers=workers)
        return run_of(num_steps=4, optimizer=optimizer, workers=workers, mesh=mesh)

    one = run(Workers("data", num_workers=4), None).fit(tmp_path / "one", quiet=True)
    mesh = MeshConfig(data=4).build(jax.devices()[:4])
    four = run(Workers("data"), mesh).fit(tmp_path / "four", quiet=True)
    np.testing.assert_allclose(one.metrics["loss"], four.metrics["loss"], rtol=1e-5)
    with pytest.raises(ValueError, match=r"Run.mesh must be a mesh with the axis 'data'"):
        run(Workers("data"), None)


@pytest.mark.parametrize("drops", [False, True], ids=["curriculum", "random-LTD"])
def test_workers_whose_batches_change_shape(drops, tmp_path):
    """The first loss is the mean over workers, which drop tokens of their own; the next ones are those of two devices. With
    random-LTD there are no two devices: in a `jax.shard_map` workers draw other tokens than simulated ones."""
    pacing = mslg(min_value=2, max_value=6, require_steps=3, seq_per_step=4)
    ltd = RandomLTD(pacing=pacing, layers=(0,))
    cut = lambda batch, length: {name: x[:, :length] for name, x in batch.items()}
    changes = Changes(Stages((0, 3), (2, 6)), ltd.shape_batch if drops else cut)
    loss = ltd.loss(next_token_loss) if drops else next_token_loss
    tokens = np.random.default_rng(0).integers(0, 17, (6, 4, 7)).astype(np.int32)
    data = [{"input_ids": x[:, :-1], "labels": x[:, 1:]} for x in tokens]

    def fit(place, workers, mesh):
        optimizer = onebit_adam(1e-3, freeze_step=2, workers=workers)
        options = {"loss": loss, "data": data, "num_steps": 4, "changes": changes}
        run = Run(model=GPT, optimizer=optimizer, workers=workers, mesh=mesh, **options)
        run.fit(tmp_path / place, quiet=True)
        return [record["loss"] for record in read_jsonl(tmp_path / place / "metrics.jsonl")]

    one = fit("one", Workers("data", num_workers=2), None)
    assert one[-1] < one[0]
    if not drops:
        two = fit("two", Workers("data"), MeshConfig(data=2).build(jax.devices()[:2]))
        np.testing.assert_allclose(one, two, rtol=1e-5)

    state = Run(model=GPT, loss=loss, optimizer=optax.adam(1e-2), num_steps=1).create(0)
    first = changes.shape_batch(data[0], 2)
    part = lambda rows: {
        name: jnp.asarray(x[rows]) if hasattr(x, "shape") else x for name, x in first.items()
    }
    of_worker = lambda worker: loss(
        state.model,
        part(slice(2 * worker, 2 * worker + 2)),
        jax.random.fold_in(jax.random.fold_in(state.key, 0), worker),
    ).mean()
    np.testing.assert_allclose(one[0], (of_worker(0) + of_worker(1)) / 2, rtol=1e-5)


def test_it_lowers_without_data_or_arrays():
    """With the shapes of a stage, for devices of which only the number is known."""
    changes = Changes(
        Stages((0, 2), (4, 8)), lambda batch, length: jax.tree.map(lambda x: x[:, :length], batch)
    )
    run = Run(model=GPT, num_steps=4, changes=changes, mesh=MeshConfig(data=8))
    ids = jax.ShapeDtypeStruct((16, 8), jnp.int32)
    batch = {"input_ids": ids, "labels": ids}
    first, last = (run.lower(batch=batch, stage=stage).as_text() for stage in (0, -1))
    assert "tensor<16x4xi32>" in first
    assert "tensor<16x8xi32>" in last
    with pytest.raises(ValueError, match=r"Run.data must be given, got None"):
        run.lower()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "Run.num_steps must be at least 1, got 0"),
        ({"eval_every": 0}, "Run.eval_every must be at least 1, or None, got 0"),
        (
            {"optimizer": AdamWConfig(), "learning_rate": -1.0},
            "Run.learning_rate must be at least 0",
        ),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        run_of(**options)


def test_one_compiled_run_serves_all_points_of_a_search(tmp_path):
    """Values that the optimizer's state holds replace those in the run."""
    run = run_of(optimizer=optax.inject_hyperparams(optax.sgd)(learning_rate=0.1), num_steps=2)
    losses = {}
    for rate in (0.1, 0.01, 0.0):
        hyperparams = None if rate == 0.1 else {"learning_rate": rate}
        trained = run.fit_in(tmp_path / str(rate), hyperparams=hyperparams, quiet=True)
        losses[rate] = trained.metrics["loss"]
        assert len(trained.compilations) == 1
        assert bool((trained.model["w"] == 0).all()) == (rate == 0)
    assert losses[0.1] < losses[0.01] < losses[0.0]


def test_a_plan_counts_layers_and_sums_the_links():
    """Four products of 8 x 16 x 16 in a scan, whose gradients take twice as many; the gradient of w goes along data."""

    def loss(params, batch, key):
        layer = lambda x, w: (jnp.tanh(x @ w), None)
        out, _ = jax.lax.scan(layer, batch["x"], params["w"])
        return Loss(out.sum(), jnp.float32(8))

    run = Run(
        model={"w": jnp.zeros((4, 16, 16))},
        loss=loss,
        optimizer=optax.sgd(0.1),
        num_steps=1,
        mesh=MeshConfig(data=8, fsdp=1),
    )
    cost = run.plan("8xH100", jax.devices(), batch={"x": jnp.ones((8, 16))})
    assert cost.operations == 3 * 4 * 2 * 8 * 16 * 16
    assert cost.compute == cost.operations / (8 * 989e12)
    assert cost.sent["data"] >= 4 * 16 * 16 * 4  # an all-reduce sends nearly twice its size
    assert cost.network["data"] == cost.sent["data"] / 450e9
    assert cost.fits
    assert cost.slowest == cost.compute + cost.network["data"] >= cost.fastest
