import itertools
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effscale.training import (
    CheckpointError,
    Checkpoints,
    JsonlWriter,
    ShapeBuckets,
    TrainingDivergedError,
    create_train_state,
    fit,
    make_train_step,
    read_jsonl,
    resume_or_start,
)
from effscale.training.signals import StopSignal

OPTIMIZER = optax.adam(1e-2)


def fresh(toy):
    return create_train_state(toy.Toy(rngs=nnx.Rngs(0)), OPTIMIZER, key=jax.random.key(0))


def step_of(toy):
    return ShapeBuckets(make_train_step(toy.loss_fn, OPTIMIZER), donate_argnums=0)


def empty_batch(toy):
    batch = toy.batch_of(8)
    return batch | {"loss_weights": np.zeros_like(batch["loss_weights"])}


def test_records_are_those_of_a_plain_loop(toy, tmp_path):
    state, step, expected = fresh(toy), jax.jit(make_train_step(toy.loss_fn, OPTIMIZER)), []
    for number, batch in enumerate(itertools.islice(toy.batches(), 6), 1):
        state, metrics = step(state, batch)
        expected.append((number, float(metrics["loss"]), number * toy.BATCH * toy.LENGTH))
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    seen = []
    result = fit(
        fresh(toy),
        step_of(toy),
        toy.batches(),
        num_steps=6,
        writer=writer,
        place_batch=lambda batch: jax.tree.map(jnp.asarray, batch),
        before_step=lambda step, batch: seen.append(step) or batch,
        evaluate=lambda state: {"val_steps": float(state.step)},
        eval_every=4,
    )
    writer.close()
    assert result.stopped_reason == "finished"
    jax.tree.map(np.testing.assert_array_equal, result.state.model, state.model)
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert records == result.history
    trained = [record for record in records if "loss" in record]
    assert [(r["step"], np.float32(r["loss"]), r["tokens"]) for r in trained] == [
        (number, np.float32(loss), tokens) for number, loss, tokens in expected
    ]
    assert [(r["step"], r["val_steps"]) for r in records if "val_steps" in r] == [
        (4, 4.0),
        (6, 6.0),
    ]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 4, 5, 6, 6]
    assert seen == [0, 1, 2, 3, 4, 5]


def test_log_every(toy):
    result = fit(fresh(toy), step_of(toy), toy.batches(), num_steps=7, log_every=3)
    assert [record["step"] for record in result.history] == [3, 6]


def test_the_end_of_the_data_ends_the_run(toy, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        batches = Positioned(itertools.islice(toy.batches(), 3))
        result = fit(fresh(toy), step_of(toy), batches, num_steps=10, checkpoints=checkpoints)
    assert (result.stopped_reason, int(result.state.step)) == ("data", 3)
    assert Checkpoints(tmp_path).latest == 3


class Positioned:
    """An iterator with a position, as ``fit`` wants for checkpoints."""

    def __init__(self, batches):
        self.batches, self.position = iter(batches), 0

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self.batches)
        self.position += 1
        return batch

    def get_state(self):
        return self.position

    def set_state(self, state):
        self.position = state


def test_skips_in_a_row_stop_the_run_and_say_what_to_do(toy, tmp_path):
    good, bad = toy.batch_of(8), empty_batch(toy)
    batches = Positioned([good, bad, bad, good, good, bad, bad, bad, bad, good, good])
    checkpoints = Checkpoints(tmp_path, every=2)
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    with pytest.raises(
        TrainingDivergedError,
        match=r"step 8: the last 3 updates.*step 4 in .*step=4.*earlier checkpoint\. Try a lower peak",
    ) as caught:
        fit(
            fresh(toy),
            step_of(toy),
            batches,
            num_steps=11,
            checkpoints=checkpoints,
            writer=writer,
            max_skipped_in_row=3,
        )
    writer.close()
    # Step 8 is a multiple of the interval too, but the run stops before it would be saved.
    # Step 6 was saved after the first of the skipped updates.
    assert (caught.value.step, caught.value.skipped_in_row, caught.value.last_checkpoint) == (
        8,
        3,
        4,
    )
    assert str(tmp_path) in str(caught.value)
    assert [record["skipped"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [
        0,
        1,
        2,
        2,
        2,
        3,
        4,
        5,
    ]


def test_checkpoints_from_before_the_skips_stay_and_can_be_gone_back_to(toy, tmp_path):
    step_fn, create = step_of(toy), lambda: fresh(toy)
    batches = lambda good: Positioned([toy.batch_of(8)] * good + [empty_batch(toy)] * (40 - good))

    def go_on(data, max_skipped, num_steps=40, **options):
        with Checkpoints(tmp_path, every=3, keep=3) as checkpoints:
            state, start = resume_or_start(checkpoints, create, data, **options)
            data.batches = itertools.islice(data.batches, start, None)
            options = {"num_steps": num_steps, "max_skipped_in_row": max_skipped}
            return start, fit(state, step_fn, data, checkpoints=checkpoints, **options)

    with pytest.raises(TrainingDivergedError, match="last checkpoint from before them is step 12"):
        go_on(batches(12), 10)
    assert Checkpoints(tmp_path).steps == [6, 9, 12, 21]
    # The newest one goes on as if nothing had been, and the good ones outlive that too.
    with pytest.raises(TrainingDivergedError, match=r"step 32: .* step 12 in"):
        go_on(batches(12), 20)
    assert Checkpoints(tmp_path).steps == [6, 9, 12, 30]
    # Back to before the skips, with other data.
    start, result = go_on(batches(40), 10, num_steps=16, step=12)
    assert (start, int(result.state.step), int(result.state.skipped)) == (12, 16, 0)
    assert Checkpoints(tmp_path).steps == [12, 15, 16]
    assert [path.name for path in (tmp_path / "set_aside").iterdir()] == ["step_00000030.0"]


def test_without_checkpoints_divergence_says_so(toy):
    batches = itertools.repeat(empty_batch(toy))
    with pytest.raises(TrainingDivergedError, match="no checkpoint from before them exists"):
        fit(fresh(toy), step_of(toy), batches, num_steps=10, max_skipped_in_row=2)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_ends(toy, tmp_path, number):
    def before_step(step, batch):
        if step == 3:
            os.kill(os.getpid(), number)
        return batch

    previous = signal.getsignal(number)
    checkpoints = Checkpoints(tmp_path)
    result = fit(
        fresh(toy),
        step_of(toy),
        toy.batches(),
        num_steps=50,
        checkpoints=checkpoints,
        before_step=before_step,
    )
    assert (result.stopped_reason, result.signal) == ("signal", number)
    assert int(result.state.step) == checkpoints.latest == 4
    assert signal.getsignal(number) is previous
    # The run goes on from there as if nothing had been.
    data = toy.batches()
    state, start = resume_or_start(Checkpoints(tmp_path), lambda: fresh(toy), data)
    assert start == 4
    ended = fit(state, step_of(toy), data, num_steps=6)
    whole = fit(fresh(toy), step_of(toy), toy.batches(), num_steps=6)
    assert result.history + ended.history == whole.history


def test_a_second_interrupt_is_not_waited_for():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.should_stop(1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_after_the_last_step_stops_the_run_as_well(toy, tmp_path):
    def evaluate(state):
        os.kill(os.getpid(), signal.SIGINT)
        return {"val_loss": 0.0}

    checkpoints = Checkpoints(tmp_path)
    result = fit(
        fresh(toy),
        step_of(toy),
        toy.batches(),
        num_steps=2,
        checkpoints=checkpoints,
        evaluate=evaluate,
    )
    assert (result.stopped_reason, result.signal) == ("signal", signal.SIGINT)
    assert checkpoints.latest == 2


def test_a_signal_that_came_too_late_is_raised_again():
    # A shell's background jobs ignore SIGINT from the start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), StopSignal():
        os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_signals_are_left_alone():
    def work():
        with StopSignal() as stop:
            results.append(stop.should_stop(1))

    results = []
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [False]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_failed_background_save_stops_the_run(toy, tmp_path, monkeypatch):
    import importlib

    def refuse(folder, known):
        raise OSError("disk full")

    monkeypatch.setattr(
        importlib.import_module("effscale.training.checkpoint"), "write_manifest", refuse
    )
    with pytest.raises(
        CheckpointError, match=r"step 2 could not be written.*disk full.*no earlier one exists"
    ):
        fit(
            fresh(toy),
            step_of(toy),
            toy.batches(),
            num_steps=9,
            checkpoints=Checkpoints(tmp_path, every=2),
        )
    assert list(tmp_path.iterdir()) == []


def test_resume_or_start_with_shardings(toy, tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    create = lambda: fresh(toy)
    everywhere = jax.tree.map(lambda _: jax.NamedSharding(mesh, jax.P()), jax.eval_shape(create))
    checkpoints = Checkpoints(tmp_path)
    state, start = resume_or_start(checkpoints, create, shardings=everywhere)
    assert start == 0
    checkpoints.save(5, state, force=True)
    again, start = resume_or_start(checkpoints, create, shardings=everywhere)
    assert start == 5
    for tree in (state, again):
        assert {
            leaf.sharding.device_set == set(jax.devices()) for leaf in jax.tree.leaves(tree)
        } == {True}
    jax.tree.map(np.testing.assert_array_equal, again.model, state.model)


def test_a_state_that_cannot_be_traced_is_restored_to_where_it_is_made(toy, tmp_path):
    """As one with weights from a file, of which each device reads its own."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.NamedSharding(mesh, jax.P())

    def create():
        state = fresh(toy)
        assert not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(state))
        return jax.device_put(state, place)

    checkpoints = Checkpoints(tmp_path)
    state, _ = resume_or_start(checkpoints, create, trace_create=False)
    checkpoints.save(5, state, force=True)
    again, start = resume_or_start(checkpoints, create, trace_create=False)
    assert start == 5
    assert {leaf.sharding for leaf in jax.tree.leaves(again)} == {place}
    jax.tree.map(np.testing.assert_array_equal, again.model, state.model)
    with pytest.raises(AssertionError):
        resume_or_start(checkpoints, create)


def test_a_start_afresh_wants_a_folder_without_checkpoints(toy, tmp_path):
    create = lambda: fresh(toy)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, create(), force=True)
    with pytest.raises(CheckpointError, match=r"resume=False .*Choose another folder, or resume"):
        resume_or_start(Checkpoints(tmp_path), create, resume=False)
    with pytest.raises(ValueError, match=r"step must be None with resume=False, got 5"):
        resume_or_start(Checkpoints(tmp_path), create, resume=False, step=5)
    # A loop that does not ask is told at its start, and not at its first save.
    with pytest.raises(CheckpointError, match=r"contains the checkpoint of step 5, .* so step 1 "):
        fit(create(), step_of(toy), toy.batches(), num_steps=9, checkpoints=Checkpoints(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005"]


@pytest.mark.parametrize("name", ["log_every", "eval_every", "max_skipped_in_row"])
def test_bad_options(toy, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        fit(fresh(toy), step_of(toy), toy.batches(), num_steps=1, **{name: 0})


def test_a_state_beyond_the_end(toy):
    done = fit(fresh(toy), step_of(toy), toy.batches(), num_steps=2).state
    with pytest.raises(ValueError, match=r"num_steps must be at least 2, .*already made, got 1"):
        fit(done, step_of(toy), toy.batches(), num_steps=1)
