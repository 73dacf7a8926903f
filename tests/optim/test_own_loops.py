"""Loops that are a user's own: `jax.pmap`, ``jax.shard_map(check_vma=False)``, parameters that no bit stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from effscale.optim import Workers
from effscale.parallel import MeshConfig, PerWorker, per_worker, simulate_workers
from tests.optim.regression import MAKERS, batches, run, start, step_of


def on_arrays(function, tree):
    is_mine = lambda node: isinstance(node, PerWorker)
    one = lambda node: jax.tree.map(function, node) if is_mine(node) else node
    return jax.tree.map(one, tree, is_leaf=is_mine)


@pytest.mark.exact
@pytest.mark.parametrize("name", MAKERS)
def test_loops_without_types(name):
    """Where types do not say what differs they are no proof that gradients were summed."""
    devices = jax.devices()[:2]
    mesh = MeshConfig(data=2).build(devices)
    optimizer = MAKERS[name](workers=Workers("data"))
    with jax.set_mesh(mesh):
        expected, _, _ = run(jax.jit(per_worker(step_of(optimizer))), optimizer)
        specs = on_arrays(lambda x: P("data"), optimizer.init(start()))
        specs = jax.tree.map(lambda x: x if isinstance(x, P) else P(), specs)

        def unchecked(params, state, batch):
            state = on_arrays(lambda x: x[0], state)
            params, state, loss = step_of(optimizer)(params, state, batch)
            return params, on_arrays(lambda x: x[None], state), loss

        step = jax.shard_map(
            unchecked,
            in_specs=(P(), specs, P("data")),
            out_specs=(P(), specs, P()),
            axis_names={"data"},
            check_vma=False,
        )
        found, _, _ = run(jax.jit(step), optimizer)
    jax.tree.map(np.testing.assert_array_equal, found, expected)

    optimizer = MAKERS[name](workers=Workers("data", num_workers=2))
    step = jax.pmap(step_of(optimizer), "data", devices=devices)
    params = jax.tree.map(lambda x: jnp.stack([x, x]), start())
    state = jax.pmap(optimizer.init, "data", devices=devices)(params)
    for batch in batches(8):
        rows = jax.tree.map(lambda x: x.reshape(2, 8, -1), batch)
        params, state, _ = step(params, state, rows)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b), params, expected)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("workers", [{}, {"workers": Workers("data", num_workers=2)}])
def test_complex_parameters_are_refused(name, workers):
    params = {"real": jnp.ones(3), "phase": jnp.ones(3, jnp.complex64)}
    with pytest.raises(
        ValueError, match=r"the array 'phase' has the dtype complex64.*split_real_and_imag"
    ):
        MAKERS[name](**workers).init(params)
    with pytest.raises(ValueError, match=r"dtype int32.*exclude it from training"):
        MAKERS[name](**workers).init({"ids": jnp.arange(3)})


def test_complex_parameters_in_two_parts():
    """What the message advises: after the warm-up, too, both parts come to rest at their goal."""
    goal = jnp.array([1 + 2j, -2 + 1j], jnp.complex64)
    optimizer = optax.contrib.split_real_and_imaginary(
        MAKERS["onebit_adam"](workers=Workers("data", num_workers=2))
    )

    def step(params, state, batch):
        return optimizer.update((params - goal) * batch, state, params)

    step = jax.jit(simulate_workers(step, 2))
    params = jnp.zeros(2, jnp.complex64)
    state = optimizer.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(60):
            updates, state = step(params, state, jnp.ones(2, jnp.complex64))
            params = params + updates
    assert (abs(params - goal) < abs(goal)).all()
