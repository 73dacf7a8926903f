"""The 1-bit mean: golden vectors, laws, and the same result however the workers are laid out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from effscale.optim import compressed_mean, init_error_feedback
from effscale.optim.workers import per_worker_zeros
from effscale.parallel import MeshConfig, PerWorker, per_worker, shardings, simulate_workers


def mean_step(scales="tensor"):
    def step(errors, tree):
        tree = jax.tree.map(lambda x: x[0], tree)
        out, new = compressed_mean(tree, errors.value, "data", scales=scales)
        return out, PerWorker(new, "data")

    return step


def zeros(tree, workers):
    one = jax.tree.map(lambda x: x[0], tree)
    return per_worker_zeros(lambda w: init_error_feedback(one, w), "data", workers)


def golden_inputs():
    """Twenty numbers and twelve zeros, so that nothing is padding."""
    i = np.arange(20)
    x = np.zeros((2, 32), np.float32)
    x[0, :20], x[1, :20] = i / 10 - 1, (19 - i) / 20 - 0.2
    return jnp.asarray(x)


def test_golden_vector():
    """DeepSpeed's numbers for two workers: scales, outputs and errors of two calls."""
    x = golden_inputs()
    step = jax.jit(simulate_workers(mean_step(), 2))
    out, errors = step(zeros(x, 2), x)
    worker, server = errors.value.worker, errors.value.server
    np.testing.assert_allclose(worker.scale, [0.45757514, 0.31499007], rtol=1e-6)
    np.testing.assert_allclose(server.scale, [0.24317071, 0.33642438], rtol=1e-6)
    expected = [-0.24317071] * 10 + [0.24317071] * 6 + [0.33642438] * 16
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    np.testing.assert_allclose(worker.error.sum(1), [-6.4909, -2.0598], atol=1e-4)
    np.testing.assert_allclose(server.error.sum((1, 2, 3)), [2.5775, -0.4622], atol=1e-4)
    np.testing.assert_allclose(worker.error[0, 20:], -0.45757514, rtol=1e-6)
    # The bits: 1 for numbers that are not negative, as numpy packs them.
    bits = np.packbits(np.asarray(worker.corrected) >= 0, axis=1)
    assert bits.tolist() == [[0, 63, 255, 255], [255, 255, 15, 255]]

    out, errors = step(errors, x)
    worker, server = errors.value.worker, errors.value.server
    np.testing.assert_allclose(worker.scale, [0.6891343, 0.49006563], rtol=1e-6)
    np.testing.assert_allclose(server.scale, [0.31437916, 0.4898415], rtol=1e-6)
    signs = np.ones(32)
    signs[[12, 19, *range(20, 32)]] = -1  # server bytes [255, 247] and [224, 0]
    np.testing.assert_allclose(
        out, signs * np.repeat([0.31437916, 0.4898415], 16).astype(np.float32), rtol=1e-6
    )
    bits = np.packbits(np.asarray(worker.corrected) >= 0, axis=1)
    assert bits.tolist() == [[0, 199, 240, 0], [255, 240, 224, 0]]


@given(
    workers=st.sampled_from([2, 3, 8]),
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    scales=st.sampled_from(["tensor", "tree"]),
    seed=st.integers(0, 100),
)
@settings(max_examples=8)
def test_nothing_is_lost(workers, sizes, scales, seed):
    """What came out in all is the mean of what went in, less what the errors still hold."""
    rng = np.random.default_rng(seed)
    tree = [jnp.asarray(rng.normal(size=(workers, n)), jnp.float32) for n in sizes]
    step = jax.jit(simulate_workers(mean_step(scales), workers))
    errors, total = zeros(tree, workers), [np.zeros(n) for n in sizes]
    for _ in range(3):
        out, errors = step(errors, tree)
        total = [a + np.asarray(b) for a, b in zip(total, out, strict=True)]
    feedback = errors.value
    for x, summed, worker, server in zip(
        tree, total, feedback.worker, feedback.server, strict=True
    ):
        left = np.asarray(worker.error).mean(0) + np.asarray(server.error).ravel()[: summed.size]
        np.testing.assert_allclose(summed + left, 3 * np.asarray(x).mean(0), atol=2e-5)
        corrected = np.asarray(server.corrected).ravel()
        assert not corrected[summed.size :].any(), "padding holds nothing"


def test_padding_counts_nowhere():
    """A worker of numbers of one size has that size as its scale, however much is padded."""
    x = jnp.full((2, 5), 2.0)
    out, errors = simulate_workers(mean_step(), 2)(zeros(x, 2), x)
    np.testing.assert_array_equal(out, 2.0)
    np.testing.assert_array_equal(errors.value.worker.scale, 2.0)


def test_zeros_stay_zeros():
    x = jnp.zeros((2, 9))
    out, errors = simulate_workers(mean_step(), 2)(zeros(x, 2), x)
    np.testing.assert_array_equal(out, 0.0)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(errors))


def test_minus_zero_is_sent_as_it_is_counted():
    """DeepSpeed's packed backend sends -0.0 as negative and books it as positive."""
    x = jnp.array([[-0.0, 1.0], [-0.0, 1.0]])
    out, errors = simulate_workers(mean_step(), 2)(zeros(x, 2), x)
    left = errors.value.worker.error.mean(0) + errors.value.server.error.reshape(-1)[:2]
    np.testing.assert_allclose(out + left, [0.0, 1.0], atol=1e-6)
    assert out[0] > 0


@pytest.fixture(scope="module")
def trees():
    rng = np.random.default_rng(1)
    return {
        "kernel": jnp.asarray(rng.normal(size=(8, 16, 24)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=(8, 13)), jnp.float32),
    }


@pytest.mark.parametrize("scales", ["tensor", "tree"])
def test_shard_map_is_vmap(trees, scales):
    errors = zeros(trees, 8)
    simulated, simulated_errors = jax.jit(simulate_workers(mean_step(scales), 8))(errors, trees)
    with jax.set_mesh(MeshConfig().build()):
        found, found_errors = jax.jit(per_worker(mean_step(scales)))(errors, trees)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(close, (found, found_errors), (simulated, simulated_errors))
    shards = [np.asarray(shard.data) for shard in found["kernel"].addressable_shards]
    assert len(shards) == 8
    assert len({shard.tobytes() for shard in shards}) == 1, "all ranks hold the same bits"


@pytest.mark.parametrize(("other", "name"), [("fsdp", "embed"), ("expert", "experts")])
def test_other_axes_compress_their_shards(trees, other, name):
    """Two workers, and parameters divided over two other axes: only bytes cross, and each shard stays where it lies."""
    mesh = MeshConfig(**{"data": 2, other: 2, "tensor": 2}).build()
    params = {
        "kernel": nnx.Param(trees["kernel"][0], axes=(name, "mlp")),
        "bias": nnx.Param(trees["bias"][0], axes=("mlp",)),
        "norm": nnx.Param(trees["bias"][0][:6]),
    }
    with jax.set_mesh(mesh):
        errors = per_worker_zeros(lambda w: init_error_feedback(params, w), "data")
        places = shardings(errors, mesh)
        assert places.value.worker["kernel"].corrected.spec == P("data", other, "tensor")
        assert places.value.server["kernel"].corrected.spec == P("data", (other, "tensor"))
        assert errors.value.worker["kernel"].corrected.sharding == (
            places.value.worker["kernel"].corrected
        ), "divided from birth"
        params = jax.device_put(params, shardings(params, mesh))
        rows = jnp.array([[1.0], [2.0]])

        def step(errors, params, row):
            mine = jax.tree.map(lambda x: x * row[0, 0], params)
            out, new = compressed_mean(mine, errors.value, "data")
            return out, PerWorker(new, "data")

        compiled = jax.jit(per_worker(step)).lower(errors, params, rows).compile()
        out, after = compiled(errors, params, rows)
    for name, x in params.items():
        value, mean = np.asarray(x.get_value()), np.asarray(out[name].get_value())
        feedback = after.value
        left = np.asarray(feedback.worker[name].error).mean(0)
        server = feedback.server[name]
        server = np.where(server.corrected == 0, 0.0, server.error)  # not the padding
        assert (
            np.sign(mean).ravel().tolist()
            == np.sign(np.where(value == 0, 1, value)).ravel().tolist()
        )
        scale = np.sqrt((value**2).mean())
        np.testing.assert_allclose(feedback.worker[name].scale, [scale, 2 * scale], rtol=1e-5)
        # What is missing in the mean is in the errors, shard by shard.
        np.testing.assert_allclose((mean + left).sum() + server.sum(), 1.5 * value.sum(), rtol=1e-3)
    kinds = collectives(compiled.as_text())
    assert kinds["all-to-all"] == {"u8"}
    assert kinds["all-gather"] == {"u8"}
    assert all(size <= 8 for size in float_sizes(compiled.as_text())), "no float but scales crosses"


def collectives(text):
    found = {}
    for line in text.splitlines():
        for kind in ("all-to-all", "all-gather", "all-reduce"):
            if f" {kind}(" in line or f" {kind}-start(" in line:
                result = line.split("=", 1)[1].split(kind)[0]
                found.setdefault(kind, set()).update(
                    part.split("[")[0].strip(" (") for part in result.split(",") if "[" in part
                )
    return found


def float_sizes(text):
    for line in text.splitlines():
        if any(f" {kind}" in line for kind in ("all-to-all(", "all-gather(", "all-reduce(")):
            result = line.split("=", 1)[1].split(" all-")[0]
            for part in result.replace("(", " ").split():
                if part.startswith("f32["):
                    dims = part[4:].split("]")[0]
                    yield int(np.prod([int(d) for d in dims.split(",") if d] or [1]))


def test_bad_input(unchecked):
    x = jnp.ones((2, 4))
    with pytest.raises(ValueError, match="axis_name must be a bound axis, got 'data'"):
        compressed_mean(x, init_error_feedback(x, 2), "data")
    with pytest.raises(ValueError, match="scales must be one of tensor, tree, got 'row'"):
        compressed_mean(x, init_error_feedback(x, 2), "data", scales="row")
    with pytest.raises(ValueError, match="another tree, another number"):
        simulate_workers(mean_step(), 2)(zeros(jnp.ones((2, 99)), 2), x)
    with pytest.raises(ValueError, match="must have the structure of the tree"):
        simulate_workers(mean_step(), 2)(zeros([x], 2), x)
    with pytest.raises(ValueError, match="must be a multiple of the 2 workers, got 3"):
        simulate_workers(mean_step(), 2)(zeros(x, 2), jnp.ones((3, 4)))
    with pytest.raises(ValueError, match="a result of the step differs between the workers"):
        simulate_workers(lambda x: x.sum(), 2)(x)
    with (
        jax.set_mesh(MeshConfig(fsdp=2, tensor=4).build()),
        pytest.raises(ValueError, match=r"shape \(4, 3\) cannot be divided"),
    ):
        init_error_feedback(jnp.ones((4, 3)), 1, P(("fsdp", "tensor")))
    with jax.set_mesh(MeshConfig().build(jax.devices()[:2])):
        with pytest.raises(ValueError, match="must be a multiple of the 2 workers, got 3"):
            per_worker(lambda x: x)(jnp.ones((3, 4)))
        with pytest.raises(ValueError, match="result differs between the workers along 'data'"):
            per_worker(lambda x: x.sum())(x)


def test_meshes_and_specs_that_do_not_fit():
    """Each answer names the axis, where JAX's would be of its insides."""
    x = jnp.ones((2, 4))
    with jax.set_mesh(MeshConfig().build(jax.devices()[:2])):
        with pytest.raises(ValueError, match="simulate_workers outside of"):
            simulate_workers(mean_step(), 2)(zeros(x, 2), x)
        with pytest.raises(ValueError, match=r"names 'tensr'.*current mesh: data"):
            init_error_feedback(x, 2, P("tensr"))

        def step(errors, x):
            return compressed_mean(x, errors.value, "data", specs=P(None, "data"))

        with pytest.raises(ValueError, match="over the workers' axis 'data'"):
            per_worker(step)(zeros(x, 2), x)
    kinds = (AxisType.Auto, AxisType.Explicit)
    explicit = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=kinds)
    with (
        jax.set_mesh(explicit),
        pytest.raises(ValueError, match="mesh axis 'tensor' has the type Explicit"),
    ):
        per_worker(mean_step())(zeros(x, 2), x)
