"""The optimizers within ``nnx.Optimizer``, and changes in place, which a step on copies would lose."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effscale.optim import Workers
from effscale.parallel import MeshConfig, per_worker, simulate_workers, worker_params
from effscale.training import Loss, create_train_state, make_train_step
from tests.optim.regression import MAKERS, batches, run, start, step_of


def linear():
    model = nnx.Linear(6, 8, rngs=nnx.Rngs(0))
    nnx.update(model, start())
    return model


def nnx_step(model, optimizer, batch):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(params):
        return jnp.mean((nnx.merge(graph, params, rest)(batch["x"]) - batch["y"]) ** 2)

    loss, gradients = jax.value_and_grad(loss_fn)(worker_params(params, optimizer.opt_state))
    optimizer.update(model, gradients)
    return model, optimizer, jax.lax.pmean(loss, "data")


@pytest.mark.parametrize("name", MAKERS)
def test_nnx_optimizer(name):
    """It trains as the plain loop does: warm-up, compressed steps and, in 0/1 Adam, local ones."""
    transformation = MAKERS[name](workers=Workers("data"))
    with jax.set_mesh(MeshConfig(data=2).build(jax.devices()[:2])):
        expected, _, _ = run(jax.jit(per_worker(step_of(transformation))), transformation)
        step = nnx.jit(per_worker(nnx_step))
        model = linear()
        optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
        for batch in batches(8):
            model, optimizer, _ = step(model, optimizer, batch)
    for key, x in expected.items():
        np.testing.assert_allclose(getattr(model, key)[...], x, rtol=1e-5, atol=1e-6)


def forgetful(scale, batch):
    scale[...] += jax.lax.pmean(batch.sum(), "data")
    return jax.lax.pmean(batch.sum(), "data")


@pytest.mark.parametrize("jit", [nnx.jit, jax.jit, lambda step: step])
def test_a_change_in_place_that_would_be_lost_is_refused(jit):
    lost = pytest.raises(ValueError, match=r"argument\[0\]\.value in place")
    with jax.set_mesh(MeshConfig().build()), lost:
        jit(per_worker(forgetful))(nnx.Param(jnp.zeros(())), jnp.ones(8))
    with lost:
        jit(simulate_workers(forgetful, 8))(nnx.Param(jnp.zeros(())), jnp.ones(8))


class Net(nnx.Module):
    def __init__(self):
        self.linear, self.norm = linear(), nnx.BatchNorm(8, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(self.linear(x))


def test_running_statistics_are_not_lost_silently():
    """In the library's step, and in the copy at which a worker takes its gradient."""
    optimizer = optax.sgd(0.1)
    step = make_train_step(lambda model, x, key: Loss(model(x).sum(), jnp.float32(1)), optimizer)
    state = create_train_state(Net(), optimizer, key=jax.random.key(0))
    with pytest.raises(ValueError, match="use_running_average=True"):
        jax.jit(step)(state, jnp.ones((4, 6)))
    state.model.norm.use_running_average = True
    jax.eval_shape(step, state, jnp.ones((4, 6)))
    with pytest.raises(ValueError, match="params contains a BatchStat"):
        worker_params(Net(), None)


def test_a_module_where_its_parameters_are_meant():
    model = linear()
    transformation = MAKERS["zero_one_adam"](workers=Workers("data", num_workers=2))
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
    with pytest.raises(ValueError, match=r"nnx\.state\(model, nnx\.Param\)"):
        worker_params(model, optimizer.opt_state)
