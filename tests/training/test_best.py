"""The best model of a run."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effscale.training import CheckpointError, KeepBest


def model(step):
    return {"w": jnp.full((3,), step, jnp.float32), "b": jnp.full((), -step, jnp.bfloat16)}


def offer(best, values):
    for step, value in values.items():
        best.offer(step, model(step), value)


def kept(folder):
    found = KeepBest(folder).restore(jax.eval_shape(lambda: model(0)))
    jax.tree.map(np.testing.assert_array_equal, found.model, model(found.step))
    return found.step, pytest.approx(found.value)


def test_the_greatest_value_is_kept_and_of_equal_ones_the_first(tmp_path):
    offer(KeepBest(tmp_path), {1: 0.25, 2: 1 / 3, 3: 0.3, 4: 1 / 3})
    assert kept(tmp_path) == (2, 1 / 3)
    assert len(list(tmp_path.glob("step_*"))) == 1


def test_what_is_not_finite_is_never_the_best(tmp_path):
    offer(KeepBest(tmp_path), {1: math.nan, 2: -5.0, 3: math.inf, 4: math.nan})
    assert kept(tmp_path) == (2, -5.0)


def test_a_run_that_goes_on_from_an_earlier_step_ends_with_the_same_model(tmp_path):
    values = {10: 0.2, 20: 0.6, 30: 0.5, 40: 0.7, 50: 0.1}
    for stopped, again in ((20, 10), (30, 10), (40, 20), (50, 40)):
        folder = tmp_path / f"{stopped}"
        offer(KeepBest(folder), {step: v for step, v in values.items() if step <= stopped})
        offer(KeepBest(folder), {step: v for step, v in values.items() if step > again})
        assert kept(folder) == (40, 0.7)


def test_a_folder_without_a_model_and_one_of_another(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model has been kept"):
        KeepBest(tmp_path).restore(model(0))
    offer(KeepBest(tmp_path), {1: 0.5})
    with pytest.raises(CheckpointError):
        KeepBest(tmp_path).restore({"other": jnp.zeros(3)})
