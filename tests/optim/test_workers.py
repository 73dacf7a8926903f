"""The optimizers on meshes: what a user writes, what is refused, what crosses the network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from effscale.optim import (
    VarianceRatio,
    lamb,
    mean_over_workers,
    onebit_adam,
    onebit_lamb,
    scale_by_zero_one_adam,
    zero_one_adam,
)
from effscale.parallel import MeshConfig, per_worker, simulate_workers, worker_params

MAKERS = {
    "onebit_adam": lambda **k: onebit_adam(0.01, freeze_step=2, **k),
    "onebit_lamb": lambda **k: onebit_lamb(0.01, freeze_step=2, **k),
    "zero_one_adam": lambda **k: zero_one_adam(
        0.01, var_freeze_step=3, var_update_scaler=1, local_step_scaler=1, local_step_clipper=2, **k
    ),
}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


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


def test_a_mesh_is_what_simulated_workers_are(make):
    simulated_optimizer = make(axis_name="data", num_workers=8)
    simulated = jax.jit(simulate_workers(step_of(simulated_optimizer), 8))
    expected = run(simulated, simulated_optimizer)
    optimizer = make(axis_name="data")
    with jax.set_mesh(MeshConfig().build()):
        found = run(jax.jit(per_worker(step_of(optimizer))), optimizer)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), found, expected
    )
    for x in jax.tree.leaves(found[0]):
        copies = {np.asarray(shard.data).tobytes() for shard in x.addressable_shards}
        assert len(copies) == 1, "all ranks hold the same bits"


def test_one_worker_needs_no_mesh(make):
    """Without an axis the same program runs, and what it does is what one worker of a mesh does."""
    alone = make()
    expected = run(jax.jit(alone_step_of(alone)), alone)
    optimizer = make(axis_name="data")
    with jax.set_mesh(MeshConfig().build(jax.devices()[:1])):
        found = run(jax.jit(per_worker(step_of(optimizer))), optimizer, steps=8)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found[0], expected[0]
    )


def test_fsdp_and_tensor_axes(make):
    """Two workers of four devices each do what two workers of one device do.

    Servers have other parts of a tensor there, so that after the warm-up the two are alike but not equal.
    """
    plain = make(axis_name="data")
    divided = make(axis_name="data", specs={"kernel": P("fsdp", "tensor"), "bias": P("tensor")})
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


def test_gradients_that_were_summed_are_refused(make):
    """Within a shard_map JAX sums the gradient of what all workers share, without being asked."""
    optimizer = make(axis_name="data")

    def forgetful(params, state, batch):
        gradients = jax.grad(loss_fn)(params, batch)
        return optimizer.update(gradients, state, params)

    with jax.set_mesh(MeshConfig().build()):
        params = start()
        state = optimizer.init(params)
        with pytest.raises(ValueError, match="summed already"):
            jax.jit(per_worker(forgetful))(params, state, next(batches(1)))


def test_an_axis_that_is_not_bound_is_refused(make):
    optimizer = make(axis_name="data", num_workers=2)
    params = start()
    with pytest.raises(ValueError, match="'data' is not bound"):
        optimizer.update(params, optimizer.init(params), params)
    with pytest.raises(ValueError, match="axis_name='rows' is not an axis"):
        make(axis_name="rows").init(params)
    with jax.set_mesh(MeshConfig().build()), pytest.raises(ValueError, match="num_workers=3, but"):
        make(axis_name="data", num_workers=3).init(params)
    with pytest.raises(ValueError, match=r"needs a mesh with the axis 'data'.*none"):
        per_worker(lambda s, b: s)(1.0, jnp.ones(4))


def test_a_result_that_differs_is_named():
    with jax.set_mesh(MeshConfig().build()), pytest.raises(ValueError, match=r"\['loss'\] differs"):
        jax.jit(per_worker(lambda s, b: {"loss": b.sum(), "s": s}))(1.0, jnp.ones(8))


def test_nonfinite_gradients_are_skipped_by_all(make):
    """One worker's NaN: nobody's parameters, moments, counters or errors change; then all goes on."""
    optimizer = make(axis_name="data", num_workers=4)
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


def test_variance_stays_once_frozen():
    optimizer = onebit_adam(0.01, freeze_step=3, axis_name="data", num_workers=2)
    step = jax.jit(simulate_workers(step_of(optimizer), 2))
    params, state = start(), optimizer.init(start())
    variances, moments = [], []
    for batch in batches(6):
        params, state, _ = step(params, state, batch)
        variances.append(state.inner[0].nu)
        moments.append(state.inner[0].mu)
    for later in variances[3:]:
        jax.tree.map(np.testing.assert_array_equal, later, variances[2])
    assert all(m["kernel"].any() for m in moments), "the momentum goes on over the switch"


def test_parameters_stay_between_synchronisations():
    """0/1 Adam's shared parameters move only when workers talk, and each worker's own gradient is taken elsewhere."""
    optimizer = zero_one_adam(
        0.05,
        var_freeze_step=2,
        local_step_scaler=2,
        local_step_clipper=4,
        axis_name="data",
        num_workers=2,
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
    optimizer = zero_one_adam(0.05, eps=0.0, var_freeze_step=2, axis_name="data", num_workers=2)
    params, state, _ = run(jax.jit(simulate_workers(step_of(optimizer), 2)), optimizer, steps=6)
    assert int(state.skipped) == 0
    assert bool((params["kernel"] != start()["kernel"]).all())


@pytest.mark.parametrize("axis_name", [None, "data"])
def test_a_local_step_leaves_the_variance_alone(axis_name):
    """Also if the gradient's square overflows, which only `skip_nonfinite` around the transformation would refuse."""
    optimizer = scale_by_zero_one_adam(
        0.1, var_freeze_step=1, local_step_scaler=1, local_step_clipper=8, axis_name=axis_name,
        num_workers=axis_name and 2,
    )  # fmt: skip

    def step(state, batch):
        return optimizer.update({"w": batch[0]}, state, {"w": jnp.zeros(2)})[1]

    step = simulate_workers(step, 2) if axis_name else step
    state = optimizer.init({"w": jnp.zeros(2)})
    for size in (1.0, 1.0, 1e20):
        learned, state = state.nu["w"], step(state, jnp.full((2, 2), size))
    assert float(learned[0]) > 0
    np.testing.assert_array_equal(state.nu["w"], learned)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_onebit_lamb_that_never_freezes_is_lamb(decay):
    never = onebit_lamb(0.1, weight_decay=decay, freeze_step=100, axis_name="data", num_workers=2)
    plain = optax.chain(mean_over_workers("data"), lamb(0.1, weight_decay=decay))
    one, _, _ = run(jax.jit(simulate_workers(step_of(never), 2)), never, steps=5)
    two, _, _ = run(jax.jit(simulate_workers(step_of(plain), 2)), plain, steps=5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), one, two)


def test_local_steps_without_a_learning_rate():
    """Where the rate is zero for a whole interval DeepSpeed divides zero by zero."""
    optimizer = zero_one_adam(
        lambda t: jnp.where(t < 6, 0.0, 0.05), var_freeze_step=2, local_step_scaler=1, local_step_clipper=2,
        axis_name="data", num_workers=2,
    )  # fmt: skip
    params, _, _ = run(jax.jit(simulate_workers(step_of(optimizer), 2)), optimizer, steps=12)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(params))
    assert bool((params["kernel"] != start()["kernel"]).any())


def test_clipping():
    """By the norms of all workers, in the warm-up and later; or by that of the mean and later by each one's own."""
    gradients = {"w": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
    params = {"w": jnp.zeros(2)}

    def momentum(freeze_step, steps, **options):
        optimizer = onebit_adam(
            0.1, b1=0.0, freeze_step=freeze_step, clip_norm=1.0, axis_name="data", num_workers=2, **options
        )  # fmt: skip

        def step(params, state, batch):
            updates, state = optimizer.update({"w": batch["w"][0]}, state, params)
            return params, state, updates

        state = optimizer.init(params)
        for _ in range(steps):
            _, state, _ = simulate_workers(step, 2)(params, state, gradients)
        return state.inner[0]

    root = np.sqrt((9 + 1) / 2)
    warm = momentum(5, 1).mu["w"]
    np.testing.assert_allclose(warm, np.array([1.5, 0.5]) / root, rtol=1e-6)
    sent = momentum(1, 2).errors.value.worker["w"].corrected
    np.testing.assert_allclose(sent, np.array([[3.0, 0.0], [0.0, 1.0]]) / root, rtol=1e-6)
    warm = momentum(5, 1, clip="local").mu["w"]
    np.testing.assert_allclose(warm, np.array([1.5, 0.5]) / np.sqrt(2.5), rtol=1e-6)
    sent = momentum(1, 2, clip="local").errors.value.worker["w"].corrected
    np.testing.assert_allclose(sent, np.array([[1.0, 0.0], [0.0, 1.0]]), rtol=1e-6)


def rows_after(mask, late):
    """The kernel after 3 and after 8 steps; its last rows get gradients in the first ``late`` steps only."""
    optimizer = onebit_adam(0.01, freeze_step=2, exp_avg_mask=mask, axis_name="data", num_workers=2)
    step = jax.jit(simulate_workers(step_of(optimizer), 2))
    params, state, seen = start(), optimizer.init(start()), []
    for i, batch in enumerate(batches(8)):
        batch["x"] = batch["x"].at[:, 3:].set(batch["x"][:, 3:] if i < late else 0.0)
        params, state, _ = step(params, state, batch)
        seen.append(np.asarray(params["kernel"]))
    return seen[2], seen[7]


def test_a_mask_keeps_rows_that_no_gradient_reaches_any_more():
    """One bit cannot say zero: without a mask such rows wander."""
    mask = {"kernel": jnp.zeros((6, 1)).at[:3].set(1.0), "bias": jnp.float32(1)}
    for given in (mask, lambda params: mask):
        before, after = rows_after(given, late=2)
        np.testing.assert_array_equal(after[3:], before[3:])
        assert (after[:3] != before[:3]).all()
    before, after = rows_after(None, late=2)
    assert (after[3:] != before[3:]).all()


def test_rows_that_never_had_a_gradient_stay_without_a_mask():
    """DeepSpeed divides the scale that their signs stand for by epsilon."""
    before, after = rows_after(None, late=0)
    np.testing.assert_array_equal(after[3:], start()["kernel"][3:])
    assert (after[:3] != before[:3]).all()


def test_a_gradient_that_comes_after_the_variance_is_frozen_moves_nothing(make):
    """Where the variance is zero there is no step size; and what is sent for the others must not suffer."""
    alone, among_two = make(), make(axis_name="data", num_workers=2)
    for optimizer, step in (
        (alone, alone_step_of(alone)),
        (among_two, simulate_workers(step_of(among_two), 2)),
    ):
        params, state, step = start(), optimizer.init(start()), jax.jit(step)
        for i, batch in enumerate(batches(12)):
            batch["x"] = batch["x"].at[:, 3:].set(batch["x"][:, 3:] if i >= 6 else 0.0)
            params, state, _ = step(params, state, batch)
        moved = np.abs(params["kernel"] - start()["kernel"])
        np.testing.assert_array_equal(moved[3:], 0.0)
        assert (moved[:3] > 0).all()
        assert moved.max() < 3.0


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


def test_layers_of_a_stack_are_layers():
    """Both LAMBs treat a stack of layers, as the library's models have it, as they treat the layers one by one."""
    rng = np.random.default_rng(3)
    layers = [jnp.asarray(rng.normal(size=(4, 3)) * (1 + i), jnp.float32) for i in range(3)]
    gradients = [jnp.asarray(rng.normal(size=(4, 3)) / (1 + i), jnp.float32) for i in range(3)]
    stack = lambda xs: {"kernel": nnx.Param(jnp.stack(xs), axes=("embed", "mlp"))}
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


@pytest.mark.parametrize("name", MAKERS)
def test_a_part_of_the_parameters(name):
    """What optax.partition gives to another optimizer, uncompressed: DeepSpeed's non_freeze groups."""
    full = optax.chain(mean_over_workers("data"), optax.sgd(0.1))
    optimizer = optax.partition(
        {"bits": MAKERS[name](axis_name="data"), "full": full}, {"kernel": "bits", "bias": "full"}
    )
    with jax.numpy_dtype_promotion("standard"), jax.set_mesh(MeshConfig().build()):
        params, _, loss = run(jax.jit(per_worker(step_of(optimizer))), optimizer, steps=8)
    assert all((params[k] != start()[k]).any() for k in params)
    assert bool(jnp.isfinite(loss))


def test_golden_local_steps():
    """Three local steps of one worker: momentum .1, .29, .161; parameters .95, .805, .76475; then momentum .1882."""
    rates = jnp.array([0.0, 0.1, 0.1, 0.05])
    optimizer = scale_by_zero_one_adam(
        lambda t: rates[t], 0.9, var_freeze_step=1, local_step_scaler=1, local_step_clipper=4, eps=0.0
    )  # fmt: skip
    params, state = jnp.ones(1), optimizer.init(jnp.ones(1))
    # The state after a first stage that ended with the variance .04 and no momentum, and steps 2 and 3 local.
    state = dataclasses.replace(
        state,
        nu=jnp.full(1, 0.04),
        count=jnp.int32(1),
        policy=state.policy._replace(local_step_interval=jnp.int32(4)),
    )
    for gradient, mu, p in ((1.0, 0.1, 0.95), (2.0, 0.29, 0.805), (-1.0, 0.1882, 0.76475)):
        updates, state = optimizer.update(jnp.full(1, gradient), state, params)
        params = params - updates
        np.testing.assert_allclose(params, p, rtol=1e-5)
        np.testing.assert_allclose(state.mu, mu, rtol=1e-4)


@pytest.mark.parametrize("name", MAKERS)
def test_bfloat16_parameters(name):
    """Under strict promotion, with weight decay, on two workers."""
    optimizer = MAKERS[name](axis_name="data", num_workers=2, weight_decay=0.1)
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
    optimizer = onebit_adam(0.01, freeze_step=2, axis_name="data")

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


def test_variance_ratio_ends_the_warm_up():
    criterion = VarianceRatio(threshold=0.96, window=5, start=10)
    optimizer = onebit_adam(0.0, b2=0.8, freeze_step=1000, variance_ratio=criterion)
    params = {"w": jnp.ones(4)}
    state = optimizer.init(params)
    frozen_at = None
    update = jax.jit(optimizer.update)
    for t in range(1, 41):
        _, new = update({"w": jnp.ones(4)}, state, params)
        if frozen_at is None and bool(new.inner[0].ratio.reached):
            frozen_at = t
        if frozen_at is not None and t > frozen_at:
            np.testing.assert_array_equal(new.inner[0].nu["w"], state.inner[0].nu["w"])
        state = new
    # (1 - 0.8^(t-5)) / (1 - 0.8^t) reaches 0.96 at t = 19 for a constant gradient.
    ratios = [(1 - 0.8 ** (t - 5)) / (1 - 0.8**t) for t in range(1, 41)]
    assert frozen_at == 1 + next(i for i, r in enumerate(ratios) if i >= 10 and r >= 0.96)


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


@pytest.mark.parametrize(
    ("maker", "options", "message"),
    [
        (onebit_adam, {"b1": 1.0}, "b1=1.0"),
        (onebit_adam, {"b2": -0.1}, "b2=-0.1"),
        (onebit_adam, {"eps": -1.0}, "eps=-1.0"),
        (onebit_adam, {"freeze_step": 0}, "freeze_step=0"),
        (onebit_adam, {"clip_norm": 0.0}, "clip_norm=0.0"),
        (onebit_lamb, {"freeze_step": -3}, "freeze_step=-3"),
        (onebit_lamb, {"coeff_beta": 1.0}, "coeff_beta=1.0"),
        (onebit_lamb, {"factor_min": 5.0}, "factor_min=5.0"),
        (onebit_lamb, {"factor_threshold": 1.5}, "factor_threshold=1.5"),
        (onebit_lamb, {"min_coeff": 11.0}, "min_coeff=11.0"),
        (zero_one_adam, {"var_update_scaler": 0}, "var_update_scaler=0"),
        (zero_one_adam, {"local_step_clipper": 0}, "local_step_clipper=0"),
        (zero_one_adam, {"var_freeze_step": 0}, "var_freeze_step=0"),
        (onebit_adam, {"num_workers": 2}, "num_workers=2 without axis_name"),
    ],
)
def test_options_out_of_range(maker, options, message):
    with pytest.raises(ValueError, match=message):
        maker(0.1, **options)
