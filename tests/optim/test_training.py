"""The optimizers in the library's own step: meshes, processes, micro-batches, checkpoints."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effscale.models import Transformer
from effscale.optim import Workers, onebit_adam
from effscale.parallel import MeshConfig, per_worker, resize_workers, simulate_workers
from effscale.training import Clip, Loss, create_train_state, make_train_step, next_token_loss
from tests.optim import gpt_onebit_curve as gpt
from tests.optim.regression import batches, loss_fn, start
from tests.parallel.local_launch import json_of_each

EXACT = {"onebit_adam": 7, "onebit_lamb": 7, "zero_one_adam": 3}
"""Losses before the first exchange of signs shows, which is where the order of sums begins to matter."""

TWO, FOUR = ((MeshConfig(data=n), jax.devices()[:n]) for n in (2, 4))

# What crosses the network, checkpoints and micro-batches are one code for all three; 0/1 Adam, which has all of it, stands for them.
ONE = [
    pytest.param(name, marks=() if name == "zero_one_adam" else pytest.mark.slow)
    for name in gpt.OPTIMIZERS
]


@pytest.fixture(scope="module", params=ONE)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def reference(name):
    """Four workers on four devices."""
    losses, state = gpt.curve(name, *FOUR)
    assert losses[-1] < losses[0] - 0.2
    for x in jax.tree.leaves(state.model):
        copies = {np.asarray(shard.data).tobytes() for shard in x.addressable_shards}
        assert len(copies) == 1, "all ranks hold the same bits"
    return losses, state


@functools.cache
def losses_of_two(name):
    """Two workers on two devices of this process."""
    return gpt.curve(name, *TWO)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", gpt.OPTIMIZERS)
def test_two_processes(name):
    """The exchange alone, between processes: tests/parallel/test_curves.py."""
    mesh = json.dumps({"data": 2})
    one, other = json_of_each("tests.optim.gpt_onebit_curve", name, mesh, devices=1)
    assert one == other, "both processes see the same, to the last digit"
    losses, expected = one["losses"], losses_of_two(name)
    np.testing.assert_allclose(losses[: EXACT[name]], expected[: EXACT[name]], rtol=1e-5)
    # Sums in another order differ in the last bit, which turns the sign of a number near zero.
    np.testing.assert_allclose(losses, expected, rtol=0.1)


def test_resume_is_bit_for_bit(name, reference, tmp_path):
    """In the warm-up, in the middle of compressed steps and, for 0/1 Adam, between two synchronizations."""
    losses, _ = gpt.curve(name, *FOUR, stop=5, folder=tmp_path)
    losses += gpt.curve(name, *FOUR, stop=9, folder=tmp_path)[0]
    more, state = gpt.curve(name, *FOUR, folder=tmp_path)
    assert losses + more == reference[0]
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.leaves((state.model, state.opt_state)),
        jax.tree.leaves((reference[1].model, reference[1].opt_state)),
    )


@pytest.mark.parametrize("name", ONE, indirect=True)
def test_another_number_of_workers_goes_on(name, reference, tmp_path):
    """Saved by four workers after compressed steps, read by two: the mean of what they kept is kept."""
    _, saved = gpt.curve(name, *FOUR, stop=9, folder=tmp_path)
    _, read = gpt.curve(name, *TWO, stop=9, folder=tmp_path)
    expected = owed(jax.device_get(saved.opt_state))
    np.testing.assert_allclose(owed(jax.device_get(read.opt_state)), expected, rtol=1e-4, atol=1e-9)
    losses, _ = gpt.curve(name, *TWO, folder=tmp_path)
    # Two workers' signs are noisier than four's; where they start from is the same.
    np.testing.assert_allclose(losses[0], reference[0][9], rtol=0.1)
    assert max(losses) < reference[0][0]


@pytest.mark.parametrize("name", ONE)
def test_other_axes(name):
    """In the warm-up the curve is that of two devices; after it servers have other parts, and it falls as well."""
    expected = losses_of_two(name)
    found, state = gpt.curve(name, MeshConfig(data=2, fsdp=2, tensor=2))
    np.testing.assert_allclose(found[: EXACT[name]], expected[: EXACT[name]], rtol=1e-4)
    assert found[-1] < found[0] - 0.2
    kernels = [x for x in jax.tree.leaves(state.model) if x.ndim > 2]
    assert any("tensor" in str(x.sharding.spec) for x in kernels)


@pytest.mark.parametrize("name", ONE)
def test_micro_batches(name):
    found, _ = gpt.curve(name, *TWO, stop=8, accumulate=2)
    np.testing.assert_allclose(found, losses_of_two(name)[:8], rtol=1e-3)


def test_an_optimizer_that_does_not_average_is_found_out():
    """Its updates would differ between workers, and parameters with them."""
    import optax

    optimizer = optax.sgd(0.1)
    step = per_worker(make_train_step(next_token_loss, optimizer, axis_name="data"))
    create = lambda: create_train_state(
        Transformer(gpt.CONFIG, rngs=nnx.Rngs(0)), optimizer, key=jax.random.key(0)
    )
    with jax.set_mesh(MeshConfig().build()), pytest.raises(ValueError, match="does not average"):
        jax.eval_shape(step, jax.eval_shape(create), gpt.batch(0))


def test_clipping_belongs_to_the_optimizer():
    optimizer = gpt.OPTIMIZERS["onebit_adam"]()
    with pytest.raises(ValueError, match=r"clip must be None with axis_name='data'"):
        make_train_step(next_token_loss, optimizer, clip=Clip(1.0), axis_name="data")


def owed(opt_state):
    """What the exchange owes: the mean error of the workers and the errors of the servers."""
    inner = opt_state.inner
    if not hasattr(inner, "own"):
        inner = inner[0]
    errors = inner.errors.value if hasattr(inner, "errors") else inner.own.value.errors
    parts = []
    residual = lambda node: hasattr(node, "corrected")
    for worker, server in zip(
        jax.tree.leaves(errors.worker, is_leaf=residual),
        jax.tree.leaves(errors.server, is_leaf=residual),
        strict=True,
    ):
        size = worker.corrected[0].size
        flat = jnp.moveaxis(server.error, 1, 0).reshape(-1)[:size]
        parts.append(jnp.mean(worker.error, 0).reshape(-1) + flat)
    found = np.concatenate(jax.device_get(parts))
    assert np.abs(found).max() > 0
    return found


def test_nothing_is_lost_when_workers_change(reference):
    state = jax.device_get(reference[1].opt_state)
    np.testing.assert_allclose(owed(resize_workers(state, 3)), owed(state), rtol=1e-4, atol=1e-9)
    with pytest.raises(ValueError, match="num_workers must be at least 1, got 0"):
        resize_workers(state, 0)


def test_a_step_that_is_skipped_sent_nothing():
    optimizer = onebit_adam(1e-3, freeze_step=6, workers=Workers("data", num_workers=2))
    loss = lambda params, batch, key: Loss(loss_fn(params, batch), jnp.float32(1))
    step = jax.jit(simulate_workers(make_train_step(loss, optimizer, axis_name="data"), 2))
    state = create_train_state(start(), optimizer, key=jax.random.key(0))
    batch = next(batches(1))
    state, metrics = step(state, batch)
    assert metrics["sent_bytes"] > 0
    state, metrics = step(state, batch | {"x": batch["x"].at[5, 0].set(jnp.nan)})
    assert int(state.skipped) == 1
    assert metrics["sent_bytes"] == 0
