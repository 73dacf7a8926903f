"""The optimizers on several simulated workers, against NumPy step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effscale.optim import Workers, onebit_adam, onebit_lamb, zero_one_adam
from effscale.parallel import simulate_workers, worker_params
from tests.optim import onebit_oracle as oracle

SHAPES = [(5, 7), (3,), (2, 3, 4)]
TARGETS = jnp.linspace(-1.0, 1.0, 4)


def start():
    rng = np.random.default_rng(0)
    return [rng.normal(size=s).astype(np.float32) for s in SHAPES]


def gradient(params, target):
    """Of a quadratic whose minimum each worker sees elsewhere; smooth, and far from signs that rounding could turn."""
    return [
        (1 + k) * (p - target * (1 + 0.3 * np.arange(p.size).reshape(p.shape) / p.size))
        for k, p in enumerate(params)
    ]


def loss(params, target):
    total = 0.0
    for k, p in enumerate(params):
        offset = 1 + 0.3 * jnp.arange(p.size, dtype=jnp.float32).reshape(p.shape) / p.size
        total += 0.5 * (1 + k) * jnp.sum((p - target * offset) ** 2)
    return total


def run(optimizer, workers, steps):
    """The parameters after each step, and all states."""

    def step(params, state, target):
        local = worker_params(params, state)
        gradients = jax.grad(loss)(local, target[0])
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = [jnp.asarray(p) for p in start()]
    state = optimizer.init(params)
    step = jax.jit(simulate_workers(step, workers))
    history = []
    for _ in range(steps):
        params, state = step(params, state, TARGETS[:workers])
        history.append(params)
    return history, state


def assert_params(found, expected, step):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5, err_msg=f"after step {step + 1}")


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize(("weight_decay", "bias_correction"), [(0.0, False), (0.1, True)])
def test_onebit_adam(workers, weight_decay, bias_correction):
    masks = [np.ones(s) for s in SHAPES]
    masks[0][2] = 0.0
    expected = oracle.OneBitAdam(
        [p.astype(np.float64) for p in start()], workers, lr=0.02, wd=weight_decay, mask=masks,
        bias_correction=bias_correction,
    )  # fmt: skip
    optimizer = onebit_adam(
        0.02,
        weight_decay=weight_decay,
        bias_correction=bias_correction,
        freeze_step=3,
        exp_avg_mask=[jnp.asarray(m) for m in masks],
        workers=Workers("data", num_workers=workers),
    )
    history, _ = run(optimizer, workers, 10)
    for i, params in enumerate(history):
        expected.step([gradient(expected.p, float(t)) for t in TARGETS[:workers]])
        assert_params(params, expected.p, i)


@pytest.mark.parametrize(
    ("workers", "weight_decay", "var_decay", "bias_correction"),
    [
        *((workers, 0.0, "update", False) for workers in (1, 2, 4)),
        *((workers, 0.1, "step", False) for workers in (1, 2, 4)),
        (2, 0.0, "update", True),
        (1, 0.1, "step", True),
    ],
)
def test_zero_one_adam(workers, weight_decay, var_decay, bias_correction):
    masks = [np.ones(s) for s in SHAPES]
    masks[0][2] = 0.0
    rate = lambda t: 0.02 / (1 + 0.1 * jnp.asarray(t, jnp.float32))
    expected = oracle.ZeroOneAdam(
        [p.astype(np.float64) for p in start()],
        workers,
        lr=rate,
        var_freeze_step=6,
        local_step_scaler=3,
        local_step_clipper=4,
        wd=weight_decay,
        mask=masks,
        var_decay=var_decay,
        bias_correction=bias_correction,
    )
    optimizer = zero_one_adam(
        rate,
        weight_decay=weight_decay,
        var_freeze_step=6,
        exp_avg_mask=[jnp.asarray(m) for m in masks],
        var_update_scaler=1,
        var_decay=var_decay,
        bias_correction=bias_correction,
        local_step_scaler=3,
        local_step_clipper=4,
        workers=Workers("data", num_workers=workers),
    )
    history, _ = run(optimizer, workers, 24)
    for i, params in enumerate(history):
        gradients = [
            gradient(p, float(t)) for p, t in zip(expected.local, TARGETS[:workers], strict=True)
        ]
        expected.step(gradients)
        if expected.rounds[-1] != 2:  # between synchronizations the shared parameters stay
            assert_params(params, expected.local[0], i)
    assert {0, 1, 2, 3} == set(expected.rounds)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_onebit_lamb(workers, weight_decay):
    expected = oracle.OneBitLamb(
        [p.astype(np.float64) for p in start()], workers, lr=0.02, wd=weight_decay
    )
    optimizer = onebit_lamb(
        0.02, weight_decay=weight_decay, freeze_step=3, workers=Workers("data", num_workers=workers)
    )
    history, state = run(optimizer, workers, 10)
    for i, params in enumerate(history):
        expected.step([gradient(expected.p, float(t)) for t in TARGETS[:workers]])
        assert_params(params, expected.p, i)
    np.testing.assert_allclose(
        [float(c.reshape(())) for c in state.inner[0].scaling_coeff], expected.a, rtol=1e-4
    )
