"""The optimizers on meshes: what a user writes, what is refused, what crosses the network."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from effscale.optim import Workers, mean_over_workers, onebit_adam, onebit_lamb, zero_one_adam
from effscale.parallel import (
    MeshConfig,
    per_worker,
    simulate_workers,
    stack_workers,
    unstack_workers,
    worker_params,
    worker_specs,
)
from effscale.training import Clip
from tests.optim.regression import MAKERS, alone_step_of, batches, loss_fn, run, start, step_of


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def test_a_mesh_is_what_simulated_workers_are(make):
    simulated_optimizer = make(workers=Workers("data", num_workers=8))
    simulated = jax.jit(simulate_workers(step_of(simulated_optimizer), 8))
    expected = run(simulated, simulated_optimizer)
    optimizer = make(workers=Workers("data"))
    with jax.set_mesh(MeshConfig().build()):
        found = run(jax.jit(per_worker(step_of(optimizer))), optimizer)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), found, expected
    )
    for x in jax.tree.leaves(found[0]):
        copies = {np.asarray(shard.data).tobytes() for shard in x.addressable_shards}
        assert len(copies) == 1, "all ranks hold the same bits"


def test_a_shard_map_of_ones_own():
    """With the specs of the state it does what `per_worker` does."""
    optimizer = MAKERS["zero_one_adam"](workers=Workers("data"))

    def body(params, state, batch):
        params, state, loss = step_of(optimizer)(params, unstack_workers(state), batch)
        return params, stack_workers(state), loss

    with jax.set_mesh(MeshConfig().build(jax.devices()[:2])):
        specs = worker_specs(optimizer.init(start()))
        own = jax.shard_map(
            body, in_specs=(P(), specs, P("data")), out_specs=(P(), specs, P()), axis_names={"data"}
        )
        found = run(jax.jit(own), optimizer)
        expected = run(jax.jit(per_worker(step_of(optimizer))), optimizer)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_one_worker_needs_no_mesh(make):
    """Without an axis the same program runs, and what it does is what one worker of a mesh does."""
    alone = make()
    expected = run(jax.jit(alone_step_of(alone)), alone)
    optimizer = make(workers=Workers("data"))
    with jax.set_mesh(MeshConfig().build(jax.devices()[:1])):
        found = run(jax.jit(per_worker(step_of(optimizer))), optimizer, steps=8)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found[0], expected[0]
    )


def test_fsdp_and_tensor_axes(make):
    """Two workers of four devices each do what two workers of one device do.

    Servers have other parts of a tensor there, so that after the warm-up the two are alike but not equal.
    """
    plain = make(workers=Workers("data"))
    divided = make(
        workers=Workers("data", specs={"kernel": P("fsdp", "tensor"), "bias": P("tensor")})
    )
    losses = {}
    for steps in (2, 12):
        with jax.set_mesh(MeshConfig(data=2).build(jax.devices()[:2])):
            expected = run(jax.jit(per_worker(step_of(plain))), plain, steps)
        with jax.set_mesh(MeshConfig(data=2, fsdp=2, tensor=2).build()):
            found = run(jax.jit(per_worker(step_of(divided))), divided, steps)
        losses[steps] = float(expected[2]), float(found[2])
        if steps == 2:
            close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
            jax.tree.map(close, found[0], expected[0])
    assert losses[12][1] < losses[2][1]
    np.testing.assert_allclose(*losses[12], rtol=0.1)


@pytest.mark.parametrize("name", MAKERS)
def test_injected_hyperparameters_of_workers(name):
    """The learning rate sits in the state, and what decides shapes is static."""
    maker = {
        "onebit_adam": onebit_adam,
        "onebit_lamb": onebit_lamb,
        "zero_one_adam": zero_one_adam,
    }[name]
    options = {"learning_rate": 0.01, "workers": Workers("data", num_workers=2)}
    plain = maker(**options)
    injected = optax.inject_hyperparams(maker)(**options)
    with jax.numpy_dtype_promotion("standard"):
        expected, found = (
            run(jax.jit(simulate_workers(step_of(optimizer), 2)), optimizer, steps=3)
            for optimizer in (plain, injected)
        )
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, found[0], expected[0])
    np.testing.assert_allclose(found[1].hyperparams["learning_rate"], 0.01)


def test_gradients_that_were_summed_are_refused(make):
    """Within a shard_map JAX sums the gradient of what all workers share, without being asked."""
    optimizer = make(workers=Workers("data"))

    def forgetful(params, state, batch):
        gradients = jax.grad(loss_fn)(params, batch)
        return optimizer.update(gradients, state, params)

    with jax.set_mesh(MeshConfig().build()):
        params = start()
        state = optimizer.init(params)
        with pytest.raises(ValueError, match="already summed"):
            jax.jit(per_worker(forgetful))(params, state, next(batches(1)))


def test_workers_that_were_left_out_are_refused(make):
    """Nothing else would show it: the gradients are summed in full precision, and the model learns."""
    optimizer = make()
    state = optimizer.init(start())
    refused = pytest.raises(ValueError, match=r"workers must be set.*Use workers=Workers\('data'\)")
    with jax.set_mesh(MeshConfig().build()), refused:
        jax.jit(per_worker(step_of(optimizer)))(start(), state, next(batches(1)))
    with refused:
        simulate_workers(step_of(optimizer), 2)(start(), state, next(batches(1)))
    alone = jax.jit(alone_step_of(optimizer))  # nothing of the step that failed is left
    alone(start(), state, next(batches(1)))


def test_an_axis_that_is_not_bound_is_refused(make):
    optimizer = make(workers=Workers("data", num_workers=2))
    params = start()
    with pytest.raises(ValueError, match="'data' is not bound"):
        optimizer.update(params, optimizer.init(params), params)
    with pytest.raises(ValueError, match="axis_name='rows' is not an axis"):
        make(workers=Workers("rows")).init(params)
    with (
        jax.set_mesh(MeshConfig().build()),
        pytest.raises(ValueError, match="num_workers must be the size 8 of the axis 'data', got 3"),
    ):
        make(workers=Workers("data", num_workers=3)).init(params)
    with pytest.raises(ValueError, match=r"needs a mesh with the axis 'data'.*none"):
        per_worker(lambda s, b: s)(1.0, jnp.ones(4))


def test_a_result_that_differs_is_named():
    with jax.set_mesh(MeshConfig().build()), pytest.raises(ValueError, match=r"\['loss'\] differs"):
        jax.jit(per_worker(lambda s, b: {"loss": b.sum(), "s": s}))(1.0, jnp.ones(8))


def test_nonfinite_gradients_are_skipped_by_all(make):
    """One worker's NaN: nobody's parameters, moments, counters or errors change; then all goes on."""
    optimizer = make(workers=Workers("data", num_workers=4))
    step = jax.jit(simulate_workers(step_of(optimizer), 4))
    params, state = start(), optimizer.init(start())
    for batch in batches(4):
        params, state, _ = step(params, state, batch)
    poisoned = next(batches(1))
    poisoned["x"] = poisoned["x"].at[5, 0].set(jnp.nan)
    after, skipped, _ = step(params, state, poisoned)
    jax.tree.map(np.testing.assert_array_equal, (after, skipped.inner), (params, state.inner))
    assert int(skipped.skipped) == 1
    on, _, _ = step(after, skipped, next(batches(1)))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(on))


def test_skipping_can_be_left_to_others(make):
    """Without it the same happens where gradients are finite, and nothing is kept back where they are not."""
    bare, optimizer = make(skip_nonfinite=False), make()
    state, skipping = bare.init(start()), optimizer.init(start())
    assert jax.tree.structure(skipping.inner) == jax.tree.structure(state)
    found, state = bare.update(start(), state, start())
    expected, _ = optimizer.update(start(), skipping, start())
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    poisoned, _ = bare.update(jax.tree.map(lambda x: x * jnp.nan, start()), state, start())
    assert all(bool(jnp.isnan(x).all()) for x in jax.tree.leaves(poisoned))


def test_clipping():
    """By the norms of all workers, in the warm-up and later; or by that of the mean and later by each one's own."""
    gradients = {"w": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
    params = {"w": jnp.zeros(2)}

    def momentum(freeze_step, steps, clip):
        optimizer = onebit_adam(
            0.1, b1=0.0, freeze_step=freeze_step, clip=clip, workers=Workers("data", num_workers=2)
        )  # fmt: skip

        def step(params, state, batch):
            updates, state = optimizer.update({"w": batch["w"][0]}, state, params)
            return params, state, updates

        state = optimizer.init(params)
        for _ in range(steps):
            _, state, _ = simulate_workers(step, 2)(params, state, gradients)
        return state.inner[0]

    root = np.sqrt((9 + 1) / 2)
    warm = momentum(5, 1, Clip(1.0)).mu["w"]
    np.testing.assert_allclose(warm, np.array([1.5, 0.5]) / root, rtol=1e-6)
    sent = momentum(1, 2, Clip(1.0)).errors.value.worker["w"].corrected
    np.testing.assert_allclose(sent, np.array([[3.0, 0.0], [0.0, 1.0]]) / root, rtol=1e-6)
    warm = momentum(5, 1, Clip(1.0, by="local")).mu["w"]
    np.testing.assert_allclose(warm, np.array([1.5, 0.5]) / np.sqrt(2.5), rtol=1e-6)
    sent = momentum(1, 2, Clip(1.0, by="local")).errors.value.worker["w"].corrected
    np.testing.assert_allclose(sent, np.array([[1.0, 0.0], [0.0, 1.0]]), rtol=1e-6)


@pytest.mark.parametrize("name", MAKERS)
def test_a_part_of_the_parameters(name):
    """What optax.partition gives to another optimizer, uncompressed: DeepSpeed's non_freeze groups."""
    full = optax.chain(mean_over_workers("data"), optax.sgd(0.1))
    optimizer = optax.partition(
        {"bits": MAKERS[name](workers=Workers("data")), "full": full},
        {"kernel": "bits", "bias": "full"},
    )
    with jax.numpy_dtype_promotion("standard"), jax.set_mesh(MeshConfig().build()):
        params, _, loss = run(jax.jit(per_worker(step_of(optimizer))), optimizer, steps=8)
    assert all((params[k] != start()[k]).any() for k in params)
    assert bool(jnp.isfinite(loss))


@pytest.mark.parametrize(
    ("name", "mu_dtype"), [*((name, None) for name in MAKERS), ("zero_one_adam", "bfloat16")]
)
def test_bfloat16_parameters(name, mu_dtype):
    """Under strict promotion, with weight decay, on two workers."""
    optimizer = MAKERS[name](
        workers=Workers("data", num_workers=2), weight_decay=0.1, mu_dtype=mu_dtype
    )
    step = jax.jit(simulate_workers(step_of(optimizer), 2))
    to_bfloat16 = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    params = to_bfloat16(start())
    state = optimizer.init(params)
    for batch in batches(8):
        params, state, loss = step(params, state, to_bfloat16(batch))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert bool(jnp.isfinite(loss))


def test_bfloat16_gradients_on_a_mesh():
    """XLA's CPU compiler dies of their all-reduce, if nothing is done about it."""
    optimizer = onebit_adam(0.01, freeze_step=2, workers=Workers("data"))

    def step(params, state, batch):
        own = worker_params(params, state)
        gradients = jax.tree.map(lambda g: g.astype(jnp.bfloat16), jax.grad(loss_fn)(own, batch))
        updates, state = optimizer.update(gradients, state, params)
        params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates)
        return params, state, state.skipped

    with jax.set_mesh(MeshConfig().build()):
        params, state, _ = run(jax.jit(per_worker(step)), optimizer, steps=4)
    assert {x.dtype for x in jax.tree.leaves(state.inner[0].mu)} == {jnp.dtype(jnp.float32)}
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(params))


def test_uncompressed_mean():
    """Adam behind `mean_over_workers` is Adam on the whole batch."""
    optimizer = optax.chain(mean_over_workers("data"), optax.adam(0.01))
    with jax.numpy_dtype_promotion("standard"), jax.set_mesh(MeshConfig().build()):
        found = run(jax.jit(per_worker(step_of(optimizer))), optimizer)
    adam = optax.adam(0.01)
    params, state = start(), adam.init(start())
    with jax.numpy_dtype_promotion("standard"):
        for batch in batches(8):
            updates, state = adam.update(jax.grad(loss_fn)(params, batch), state, params)
            params = optax.apply_updates(params, updates)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found[0], params
    )
