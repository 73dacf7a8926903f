import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effscale.parallel import PerWorker, simulate_workers
from effscale.parallel.worker_steps import WorkerAxis
from effscale.training.guarded_update import by_branch, by_selection, loses_finite, update_if

LARGE = 3e38


def sound(new, old):
    return ~loses_finite(new, old)


def update(old):
    """Doubles everything: 3e38 overflows, and infinity stays."""
    return jax.tree.map(lambda x: x * 2, old)


@pytest.mark.parametrize("form", [by_branch, by_selection])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"weight": LARGE}, False),
        ({"moment": LARGE}, False),
        ({"moment": np.inf}, True),  # optimizers keep an infinity as "no best value yet"
        ({"count": 2**30}, True),  # integers wrap
    ],
)
def test_an_update_that_loses_a_finite_number_is_not_made(form, change, expected):
    values = {"weight": 1.0, "moment": 1.0} | {k: v for k, v in change.items() if k != "count"}
    old = {name: jnp.array([1.0, value], jnp.float32) for name, value in values.items()}
    old["count"] = jnp.int32(change.get("count", 1))
    new, made = jax.jit(lambda old: form(jnp.array(True), update, sound, old))(old)
    assert bool(made) == expected
    jax.tree.map(np.testing.assert_array_equal, new, update(old) if expected else old)


@pytest.mark.parametrize("bad_worker", [None, 2])
def test_all_workers_skip_where_one_must(bad_worker):
    """What each worker keeps for itself counts too, and no worker goes ahead alone."""
    own = np.ones((4, 3), np.float32)
    if bad_worker is not None:
        own[bad_worker] = LARGE
    state = {"shared": jnp.ones(3), "own": PerWorker(jnp.asarray(own), "data")}

    @functools.partial(simulate_workers, num_workers=4)
    def step(state, batch):
        return update_if(jnp.array(True), update, state, WorkerAxis("data").everywhere)

    new, made = jax.jit(step)(state, jnp.zeros(4))
    assert bool(made) == (bad_worker is None)
    factor = 2 if bad_worker is None else 1
    np.testing.assert_array_equal(new["shared"], factor * np.ones(3))
    np.testing.assert_array_equal(new["own"].value, factor * own)


def test_optimizers_that_start_from_infinity_are_not_held_back():
    """The best value that `optax.contrib.reduce_on_plateau` has seen is infinite at first."""
    plateau = optax.contrib.reduce_on_plateau(accumulation_size=2)
    old = plateau.init(jnp.ones(2))
    assert any(not np.isfinite(x).all() for x in jax.tree.leaves(old))
    assert not loses_finite(old, old)
