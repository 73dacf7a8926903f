"""LAMB and 1-bit LAMB: one layer, a stack of them, and rows that do not move."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effscale.optim import Workers, lamb, mean_over_workers, onebit_lamb
from effscale.parallel import simulate_workers
from tests.optim.regression import run, step_of


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_onebit_lamb_that_never_freezes_is_lamb(decay):
    never = onebit_lamb(
        0.1, weight_decay=decay, freeze_step=100, workers=Workers("data", num_workers=2)
    )
    plain = optax.chain(mean_over_workers("data"), lamb(0.1, weight_decay=decay))
    one, _, _ = run(jax.jit(simulate_workers(step_of(never), 2)), never, steps=5)
    two, _, _ = run(jax.jit(simulate_workers(step_of(plain), 2)), plain, steps=5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), one, two)


@pytest.mark.parametrize("axes", [("embed", "mlp"), ("experts", "embed", "mlp")])
def test_layers_and_experts_of_a_stack_are_layers(axes):
    """Both LAMBs treat a stack of layers or experts, as the library's models have it, as they treat them one by one."""
    rng = np.random.default_rng(3)
    layers = [jnp.asarray(rng.normal(size=(4, 3)) * (1 + i), jnp.float32) for i in range(3)]
    gradients = [jnp.asarray(rng.normal(size=(4, 3)) / (1 + i), jnp.float32) for i in range(3)]
    stack = lambda xs: {"kernel": nnx.Param(jnp.stack(xs), axes=axes)}
    for make in (lamb, lambda rate: onebit_lamb(rate, freeze_step=2)):
        optimizer = make(0.01)
        alone, stacked = layers, stack(layers)
        state, stacked_state = optimizer.init(alone), optimizer.init(stacked)
        for _ in range(5):
            updates, state = optimizer.update(gradients, state, alone)
            alone = optax.apply_updates(alone, updates)
            updates, stacked_state = optimizer.update(stack(gradients), stacked_state, stacked)
            stacked = optax.apply_updates(stacked, updates)
        np.testing.assert_allclose(stacked["kernel"].get_value(), jnp.stack(alone), rtol=1e-5)


@pytest.mark.parametrize("bounds", [{"max_coeff": 1.0}, {"min_coeff": 1.0}])
def test_a_coefficient_that_its_bound_makes_one_is_followed(bounds):
    """DeepSpeed takes an exact one for a norm of zero, does not follow it, and multiplies by zero after the freeze."""
    optimizer = onebit_lamb(0.01, freeze_step=3, **bounds)
    params = {"w": jnp.full(4, 50.0 if "max_coeff" in bounds else 1e-3)}
    state = optimizer.init(params)
    for t in range(6):
        updates, state = optimizer.update({"w": jnp.ones(4)}, state, params)
        assert (updates["w"] != 0).all(), t
        params = optax.apply_updates(params, updates)
    expected = 1 - 0.9**3  # the average of ones, from zero
    np.testing.assert_allclose(state.inner[0].frozen_coeff["w"], expected, rtol=1e-6)


def test_a_layer_without_a_coefficient_has_one():
    """A bias of zeros after a warm-up in which the rate was zero: it had no norm to divide yet."""
    optimizer = onebit_lamb(lambda t: jnp.where(t < 2, 0.0, 0.1), freeze_step=2)
    params = {"bias": jnp.zeros(3), "kernel": jnp.ones(3)}
    state = optimizer.init(params)
    for _ in range(4):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    assert all((params[k] != start).all() for k, start in (("bias", 0.0), ("kernel", 1.0)))


@pytest.mark.parametrize("late", [0, 2])
def test_what_does_not_move_has_no_say_in_the_factor_of_a_layer(late):
    """Rows that never had a gradient, or have none any more and a mask, change nothing for the others."""
    rng = np.random.default_rng(4)
    gradients = rng.normal(size=(12, 6, 3)).astype(np.float32)
    gradients[2:] *= 2.0

    def factors(rows, mask=None):
        optimizer = onebit_lamb(0.01, 0.9, 0.9, freeze_step=2, exp_avg_mask=mask)
        params = jnp.ones((rows, 3))
        state, seen = optimizer.init(params), []
        for i, g in enumerate(gradients):
            g = np.where((np.arange(6)[:, None] < 3) | (i < late), g, 0.0)[:rows]
            updates, state = optimizer.update(jnp.asarray(g), state, params)
            params = optax.apply_updates(params, updates)
            seen.append(float(state.inner[0].last_factor.reshape(())))
        return seen

    mask = jnp.zeros((6, 1)).at[:3].set(1.0) if late else None
    expected = factors(3)
    assert min(expected) < 0.9
    np.testing.assert_allclose(factors(6, mask), expected, rtol=1e-5)
