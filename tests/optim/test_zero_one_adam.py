"""0/1 Adam's local steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effscale.optim import Workers, zero_one_adam
from effscale.parallel import simulate_workers
from tests.optim.regression import batches, run, start, step_of


def test_parameters_stay_between_synchronizations():
    """0/1 Adam's shared parameters move only when workers talk, and each worker's own gradient is taken elsewhere."""
    optimizer = zero_one_adam(
        0.05,
        var_freeze_step=2,
        local_step_scaler=2,
        local_step_clipper=4,
        workers=Workers("data", num_workers=2),
    )
    step = jax.jit(simulate_workers(step_of(optimizer), 2))
    params, state = start(), optimizer.init(start())
    moved = []
    for batch in batches(12):
        new, state, _ = step(params, state, batch)
        moved.append(bool((new["kernel"] != params["kernel"]).any()))
        params = new
    # t = 3, 4 at interval 1, then t = 6 at interval 2, then multiples of 4.
    assert moved == [True] * 4 + [False, True] + [False, True] + [False] * 3 + [True]


def test_zero_one_adam_without_an_epsilon():
    """Before the first step the variance is zero, and so is the way: 0 / 0 must not be where gradients are taken."""
    optimizer = zero_one_adam(
        0.05, eps=0.0, var_freeze_step=2, workers=Workers("data", num_workers=2)
    )
    params, state, _ = run(jax.jit(simulate_workers(step_of(optimizer), 2)), optimizer, steps=6)
    assert int(state.skipped) == 0
    assert bool((params["kernel"] != start()["kernel"]).all())


@pytest.mark.parametrize("workers", [None, Workers("data", num_workers=2)])
def test_a_local_step_leaves_the_variance_alone(workers):
    """Also if the gradient's square overflows, which only `skip_nonfinite` would refuse."""
    optimizer = zero_one_adam(
        0.1, var_freeze_step=1, local_step_scaler=1, local_step_clipper=8, workers=workers,
        skip_nonfinite=False,
    )  # fmt: skip

    def step(state, batch):
        return optimizer.update({"w": batch[0]}, state, {"w": jnp.zeros(2)})[1]

    step = simulate_workers(step, 2) if workers else step
    state = optimizer.init({"w": jnp.zeros(2)})
    for size in (1.0, 1.0, 1e20):
        learned, state = state.nu["w"], step(state, jnp.full((2, 2), size))
    assert float(learned[0]) > 0
    np.testing.assert_array_equal(state.nu["w"], learned)


def test_local_steps_without_a_learning_rate():
    """Where the rate is zero for a whole interval DeepSpeed divides zero by zero."""
    optimizer = zero_one_adam(
        lambda t: jnp.where(t < 6, 0.0, 0.05), var_freeze_step=2, local_step_scaler=1, local_step_clipper=2,
        workers=Workers("data", num_workers=2),
    )  # fmt: skip
    params, _, _ = run(jax.jit(simulate_workers(step_of(optimizer), 2)), optimizer, steps=12)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(params))
    assert bool((params["kernel"] != start()["kernel"]).any())


def test_golden_local_steps():
    """Three local steps of one worker: momentum .1, .29, .161; parameters .95, .805, .76475; then momentum .1882."""
    rates = jnp.array([0.0, 0.1, 0.1, 0.05])
    optimizer = zero_one_adam(
        lambda t: rates[t], 0.9, var_freeze_step=1, local_step_scaler=1, local_step_clipper=4, eps=0.0,
        skip_nonfinite=False,
    )  # fmt: skip
    params, state = jnp.ones(1), optimizer.init(jnp.ones(1))
    # The state after a first stage that ended with the variance .04 and no momentum, and steps 2 and 3 local.
    state = state._replace(
        nu=jnp.full(1, 0.04),
        count=jnp.int32(1),
        policy=state.policy._replace(local_step_interval=jnp.int32(4)),
    )
    for gradient, mu, p in ((1.0, 0.1, 0.95), (2.0, 0.29, 0.805), (-1.0, 0.1882, 0.76475)):
        updates, state = optimizer.update(jnp.full(1, gradient), state, params)
        params = params + updates
        np.testing.assert_allclose(params, p, rtol=1e-5)
        np.testing.assert_allclose(state.mu, mu, rtol=1e-4)
