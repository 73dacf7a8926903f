"""A linear model that workers fit: its batches, its steps and the optimizers they take."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effscale.optim import onebit_adam, onebit_lamb, zero_one_adam
from effscale.parallel import worker_params

MAKERS = {
    "onebit_adam": lambda **k: onebit_adam(0.01, freeze_step=2, **k),
    "onebit_lamb": lambda **k: onebit_lamb(0.01, freeze_step=2, **k),
    "zero_one_adam": lambda **k: zero_one_adam(
        0.01, var_freeze_step=3, var_update_scaler=1, local_step_scaler=1, local_step_clipper=2, **k
    ),
}


def start():
    rng = np.random.default_rng(0)
    return {
        "kernel": jnp.asarray(rng.normal(size=(6, 8)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=(8,)), jnp.float32),
    }


def batches(steps, rows=16):
    rng = np.random.default_rng(1)
    for _ in range(steps):
        x = rng.normal(size=(rows, 6))
        yield {
            "x": jnp.asarray(x, jnp.float32),
            "y": jnp.asarray(np.tanh(x @ np.ones((6, 8))), jnp.float32),
        }


def loss_fn(params, batch):
    return jnp.mean((batch["x"] @ params["kernel"] + params["bias"][None] - batch["y"]) ** 2)


def step_of(optimizer):
    """A plain optax loop's step; `worker_params` and the mean of the loss are what distribution adds."""
    alone = alone_step_of(optimizer)

    def step(params, state, batch):
        params, state, loss = alone(params, state, batch)
        return params, state, jax.lax.pmean(loss, "data")

    return step


def alone_step_of(optimizer):
    def step(params, state, batch):
        loss, gradients = jax.value_and_grad(loss_fn)(worker_params(params, state), batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def run(step, optimizer, steps=8):
    params = start()
    state = optimizer.init(params)
    for batch in batches(steps):
        params, state, loss = step(params, state, batch)
    return params, state, loss
