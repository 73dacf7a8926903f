"""The loss curve of a model with experts is the same wherever its experts are, and goes on from a checkpoint on another mesh."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from effscale.models import Transformer
from effscale.optim import Workers, onebit_adam
from effscale.parallel import Exchange, MeshConfig, per_worker, shard_batch, shardings
from effscale.training import Clip, create_train_state, make_train_step, next_token_loss
from tests.moe import moe_curve
from tests.moe.moe_curve import curve
from tests.parallel.local_launch import json_of_each


@pytest.fixture(scope="module")
def reference():
    losses = curve(MeshConfig(), jax.devices()[:1])
    assert losses[-1] < losses[0] - 0.5, "a curve that does not fall would agree too easily"
    return losses


def test_a_checkpoint_goes_on_with_experts_on_other_devices(reference, tmp_path):
    """From one expert on each device to all on one: with the optimizer's state, or the curve would be another."""
    losses = curve(MeshConfig(data=1, expert=8), stop=3, folder=tmp_path)
    losses += curve(MeshConfig(data=1, fsdp=2, expert=2, tensor=2), stop=6, folder=tmp_path)
    losses += curve(MeshConfig(), jax.devices()[:1], folder=tmp_path)
    np.testing.assert_allclose(losses, reference, rtol=1e-5)


@pytest.mark.slow  # tests/moe/test_meshes.py has the same exchange on one process's devices, and is quick
def test_two_processes(reference):
    """Tokens travel to the experts of the other process, within each process first."""
    for found in json_of_each("tests.moe.moe_curve", json.dumps({"data": 1, "expert": 8})):
        np.testing.assert_allclose(found["losses"], reference, rtol=1e-5)


def test_one_bit_between_replicas_of_the_experts():
    """1-bit Adam over ``data``: two workers, whose experts lie on one device or on four, agree until updates are compressed, and both learn."""
    optimizer = onebit_adam(1e-2, freeze_step=5, clip=Clip(1.0), workers=Workers("data"))
    create = lambda: create_train_state(
        Transformer(moe_curve.model(Exchange()), rngs=nnx.Rngs(0)), optimizer, key=jax.random.key(0)
    )
    step = jax.jit(per_worker(make_train_step(next_token_loss, optimizer, axis_name="data")))

    def losses(config, devices):
        mesh, found = config.build(jax.devices()[:devices]), []
        with jax.set_mesh(mesh):
            layout = shardings(jax.eval_shape(create), mesh)
            state = jax.jit(create, out_shardings=layout)()
            for number in range(12):
                state, metrics = step(state, shard_batch(moe_curve.batch(number), mesh))
                found.append(float(metrics["loss"]))
        return found

    together, apart = losses(MeshConfig(data=2), 2), losses(MeshConfig(data=2, expert=4), 8)
    np.testing.assert_allclose(apart[:6], together[:6], rtol=1e-5)
    assert np.isfinite(apart).all()
    for found in (together, apart):
        assert np.mean(found[-2:]) < found[5]
