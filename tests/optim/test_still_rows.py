"""Elements that no gradient reaches: one bit cannot say zero."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effscale.optim import Workers, lamb, onebit_adam, params_without_variance
from effscale.parallel import simulate_workers
from tests.optim.regression import MAKERS, alone_step_of, batches, start, step_of


def rows_after(mask, late):
    """The kernel after 3 and after 8 steps; its last rows get gradients in the first ``late`` steps only."""
    optimizer = onebit_adam(
        0.01, freeze_step=2, exp_avg_mask=mask, workers=Workers("data", num_workers=2)
    )
    step = jax.jit(simulate_workers(step_of(optimizer), 2))
    params, state, seen = start(), optimizer.init(start()), []
    for i, batch in enumerate(batches(8)):
        batch["x"] = batch["x"].at[:, 3:].set(batch["x"][:, 3:] if i < late else 0.0)
        params, state, _ = step(params, state, batch)
        seen.append(np.asarray(params["kernel"]))
    return seen[2], seen[7]


def test_a_mask_keeps_rows_that_no_gradient_reaches_any_more():
    """One bit cannot say zero: without a mask such rows wander."""
    mask = {"kernel": jnp.zeros((6, 1)).at[:3].set(1.0), "bias": jnp.float32(1)}
    for given in (mask, lambda params: mask):
        before, after = rows_after(given, late=2)
        np.testing.assert_array_equal(after[3:], before[3:])
        assert (after[:3] != before[:3]).all()
    before, after = rows_after(None, late=2)
    assert (after[3:] != before[3:]).all()


def test_rows_that_never_had_a_gradient_stay_without_a_mask():
    """DeepSpeed divides the scale that their signs stand for by epsilon."""
    before, after = rows_after(None, late=0)
    np.testing.assert_array_equal(after[3:], start()["kernel"][3:])
    assert (after[:3] != before[:3]).all()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_late_gradient_does_not_disturb_the_others(make):
    """It must not reach the scale that all share: what moves is the same without it, and with one of a hundred."""

    def after(late):
        optimizer = make(workers=Workers("data", num_workers=2))

        def step(params, state, batch):
            updates, state = optimizer.update({"w": batch[0]}, state, params)
            return optax.apply_updates(params, updates), state

        step = jax.jit(simulate_workers(step, 2))
        params = {"w": jnp.ones(16)}
        state, rng = optimizer.init(params), np.random.default_rng(5)
        for i in range(10):
            gradients = rng.normal(size=(2, 16)).astype(np.float32)
            gradients[:, 8:] *= late if i >= 3 else 0.0
            params, state = step(params, state, jnp.asarray(gradients))
        return np.asarray(params["w"])

    without = after(0.0)
    np.testing.assert_array_equal(after(100.0), without)
    assert (without[:8] != 1.0).all()
    np.testing.assert_array_equal(without[8:], 1.0)


@pytest.mark.parametrize(
    "make", [*MAKERS.values(), lambda **k: lamb(0.01, **k)], ids=[*MAKERS, "lamb"]
)
def test_rows_that_never_had_a_gradient_without_an_epsilon(make):
    """Zero by zero is no number."""
    optimizer = make(eps=0.0)
    params = jnp.ones((4, 3))
    state = optimizer.init(params)
    for i in range(8):
        gradients = jnp.full((4, 3), 1.0 + i).at[2:].set(0.0)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    assert bool(jnp.isfinite(params).all())
    np.testing.assert_array_equal(params[2:], 1.0)
    assert (params[:2] != 1.0).all()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_gradient_that_comes_after_the_variance_is_frozen_moves_nothing(make):
    """Where the variance is zero there is no step size."""
    alone, among_two = make(), make(workers=Workers("data", num_workers=2))
    for optimizer, step in (
        (alone, alone_step_of(alone)),
        (among_two, simulate_workers(step_of(among_two), 2)),
    ):
        params, state, step = start(), optimizer.init(start()), jax.jit(step)
        assert params_without_variance(state) == 6 * 8 + 8
        for i, batch in enumerate(batches(12)):
            batch["x"] = batch["x"].at[:, 3:].set(batch["x"][:, 3:] if i >= 6 else 0.0)
            params, state, _ = step(params, state, batch)
            assert params_without_variance(state) == 3 * 8
        moved = np.abs(params["kernel"] - start()["kernel"])
        np.testing.assert_array_equal(moved[3:], 0.0)
        assert (moved[:3] > 0).all()
