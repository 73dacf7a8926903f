"""A step under a schedule of shapes: same numbers as cropping by hand, one compilation a shape."""

import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effscale.training import (
    Loss,
    StagedStep,
    Stages,
    create_train_state,
    fit,
    make_train_step,
)

OPTIMIZER = optax.sgd(0.1)


def loss(model, batch, key):
    wrong = (batch["x"] @ model["w"] - batch["y"][:, None]) ** 2
    return Loss(wrong.sum(), jnp.float32(wrong.size))


def state():
    return create_train_state({"w": jnp.ones((3, 1))}, OPTIMIZER, key=jax.random.key(0))


def batches(count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield {
            "x": rng.normal(size=(8, 3)).astype(np.float32),
            "y": rng.normal(size=8).astype(np.float32),
        }


def crop(batch, rows):
    return {name: value[:rows] for name, value in batch.items()}


def test_equals_cropping_by_hand_and_compiles_a_shape_once():
    stages = Stages((0, 2, 4, 6, 8), (2, 4, 8, 4, 2))
    staged = StagedStep(make_train_step(loss, OPTIMIZER), stages, crop, place_batch=jax.device_put)
    out = fit(
        state(),
        staged,
        batches(10),
        num_steps=10,
        before_step=staged.before_step,
        place_batch=jax.device_put,
    )
    expected = state()
    plain = jax.jit(make_train_step(loss, OPTIMIZER))
    for step, batch in enumerate(batches(10)):
        expected, _ = plain(expected, crop(batch, stages(step)))
    np.testing.assert_array_equal(out.state.model["w"], expected.model["w"])
    staged.wait()
    assert staged.num_compilations == 3
    assert [record.background for record in staged.compilations] == [False, True, True]


def test_later_shapes_are_compiled_after_the_first_step_in_order_and_off_the_main_thread():
    traced = []

    def step(total, batch):
        traced.append((batch["x"].shape[0], threading.current_thread() is threading.main_thread()))
        return total + batch["x"].sum(), {}

    staged = StagedStep(step, Stages((0, 5, 9), (2, 4, 8)), crop)
    batch = next(batches(1))
    total, _ = staged(jnp.float32(0), staged.before_step(0, batch))
    staged.wait()
    assert traced == [(2, True), (4, False), (8, False)]
    for number in (4, 5, 9, 10):
        total, _ = staged(total, staged.before_step(number, batch))
    assert len(traced) == 3
    expected = sum(batch["x"][:rows].sum() for rows in (2, 2, 4, 8, 8))
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_a_number_in_the_state_does_not_make_a_shape_compile_twice():
    """Such as one that ``optax.inject_hyperparams`` keeps there: its type is weak."""
    state = jnp.asarray(0)
    assert state.weak_type
    staged = StagedStep(lambda n, batch: (n + 1, batch["x"].sum()), Stages((0, 1), (2, 4)), crop)
    for step, batch in enumerate(batches(2)):
        state, _ = staged(state, staged.before_step(step, batch))
    assert (int(state), staged.num_compilations) == (2, 2)


def test_a_resumed_run_compiles_only_what_is_to_come():
    staged = StagedStep(make_train_step(loss, OPTIMIZER), Stages((0, 2, 4), (2, 4, 8)), crop)
    batch = next(batches(1))
    staged(state(), staged.before_step(3, batch))
    staged.wait()
    shapes = [record.signature for record in staged.compilations]
    assert len(shapes) == 2
    assert "[4, 3]" in shapes[0]
    assert "[8, 3]" in shapes[1]


def test_close_gives_up_what_has_not_begun():
    begun, go_on, traced = threading.Event(), threading.Event(), []

    def step(total, batch):
        rows = batch["x"].shape[0]
        traced.append(rows)
        if rows == 4:
            begun.set()
            assert go_on.wait(60)
        return total + batch["x"].sum(), {}

    staged = StagedStep(step, Stages((0, 2, 4), (2, 4, 8)), crop)
    batch = next(batches(1))
    staged(jnp.float32(0), staged.before_step(0, batch))
    assert begun.wait(60)
    threading.Timer(0.2, go_on.set).start()
    staged.close()
    assert traced == [2, 4]
    # A shape that was given up is compiled when it comes.
    staged(jnp.float32(0), staged.before_step(4, batch))
    assert traced == [2, 4, 8]


def test_exit_does_not_wait_for_what_has_not_begun():
    program = """
import sys, time
import jax.numpy as jnp
from effscale.training import ShapeBuckets

def slow(x):
    print(x.shape[0], flush=True)
    time.sleep(1)
    return x

buckets = ShapeBuckets(slow)
for size in range(1, 9):
    buckets.prepare(jnp.ones(size))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert len(done.stdout.split()) < 8
