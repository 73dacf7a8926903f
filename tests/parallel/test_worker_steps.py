"""Steps on each worker: a state of another number of workers, and values that are the same whatever their type says."""

import jax
import jax.numpy as jnp
import pytest

from effscale.parallel import MeshConfig, PerWorker, per_worker, resize_workers, simulate_workers


@pytest.mark.parametrize("held", [16, 4])
def test_a_state_of_another_number_of_workers(held):
    """Sixteen on eight would run, and drop the errors of every second one."""
    state = PerWorker(jnp.arange(held, dtype=jnp.float32), "data")
    step = lambda state, batch: jax.tree.map(lambda x: x + batch.sum(), state)
    refused = pytest.raises(
        ValueError, match=rf"one of {held} workers, but the axis 'data' has 8.*resize_workers"
    )
    with jax.set_mesh(MeshConfig().build()):
        with refused:
            jax.jit(per_worker(step))(state, jnp.ones(8))
        resized = resize_workers(state, 8)
        assert jax.jit(per_worker(step))(resized, jnp.ones(8)).value.shape == (8,)
    with refused:
        simulate_workers(step, 8)(state, jnp.ones(8))
    with pytest.raises(ValueError, match="without a dimension for workers"):
        simulate_workers(step, 8)(PerWorker(jnp.float32(1), "data"), jnp.ones(8))


STEPS = {
    "sum": lambda scale, own, batch: scale + jnp.zeros_like(batch)[0],
    "selected": lambda scale, own, batch: jnp.where(
        jnp.zeros_like(batch)[0] == 0, scale, jax.jit(jnp.square)(jnp.zeros_like(batch)[0])
    ),
    "batch": lambda scale, own, batch: scale + batch[0],
    "own": lambda scale, own, batch: scale + own.value,
    "number": lambda scale, own, batch: scale + jax.lax.axis_index("data").astype(jnp.float32),
}


@pytest.mark.parametrize("name", STEPS)
def test_what_depends_on_nothing_that_differs_is_shared(name):
    """Through types, selections and compiled parts; not through the batch, a PerWorker or a worker's number."""
    args = (jnp.float32(3.0), PerWorker(jnp.ones(8), "data"), jnp.arange(8.0))
    step = jax.jit(per_worker(STEPS[name]))
    with jax.set_mesh(MeshConfig().build()):
        if name in ("sum", "selected"):
            assert step(*args) == 3.0
        else:
            with pytest.raises(ValueError, match="differs between the workers"):
                step(*args)
