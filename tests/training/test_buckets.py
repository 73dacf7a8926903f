import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effscale.training import (
    AdamWConfig,
    ShapeBuckets,
    abstract,
    create_train_state,
    make_train_step,
)


def describe(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def mesh_of(*shape):
    return jax.make_mesh(
        shape,
        ("data", "tensor")[: len(shape)],
        axis_types=(jax.sharding.AxisType.Auto,) * len(shape),
    )


def test_a_prepared_shape_is_compiled_in_the_background_and_once():
    threads, records = [], []

    def double(x):
        threads.append(threading.current_thread())  # while tracing
        return 2 * x

    buckets = ShapeBuckets(double, on_compile=records.append)
    buckets.prepare(describe(3))
    buckets.prepare(describe(3))
    np.testing.assert_array_equal(buckets(jnp.arange(3.0)), [0, 2, 4])
    np.testing.assert_array_equal(buckets(np.ones(3, np.float32)), [2, 2, 2])
    assert buckets.num_compilations == 1
    assert records == buckets.compilations
    assert records[0].background
    assert "float32[3]" in records[0].signature
    assert threading.main_thread() not in threads


def test_an_unknown_shape_is_compiled_at_the_call():
    buckets = ShapeBuckets(lambda x: x + 1)
    for size in (2, 3, 2, 3, 2):
        assert buckets(jnp.zeros(size)).shape == (size,)
    assert [record.background for record in buckets.compilations] == [False, False]


def test_prepare_does_not_stall_and_a_call_waits_for_it():
    release = threading.Event()

    def slow(x):
        if threading.current_thread() is not threading.main_thread():
            assert release.wait(30)
        return x + 1

    buckets = ShapeBuckets(slow)
    buckets(jnp.zeros(2))
    buckets.prepare(describe(3))
    # The other shape goes on while the new one is being compiled.
    assert buckets(jnp.zeros(2)).shape == (2,)
    assert buckets.num_compilations == 1
    threading.Timer(0.05, release.set).start()
    assert buckets(jnp.zeros(3)).shape == (3,)
    assert buckets.num_compilations == 2


def test_an_error_in_the_background_surfaces_at_the_call():
    def refuse(x):
        if x.shape == (3,):
            raise RuntimeError("no threes")
        return x

    buckets = ShapeBuckets(refuse)
    buckets.prepare(describe(3))
    with pytest.raises(RuntimeError, match="no threes"):
        buckets.wait()
    with pytest.raises(RuntimeError, match="no threes"):
        buckets(jnp.zeros(3))
    assert buckets(jnp.zeros(2)).shape == (2,)
    assert buckets.num_compilations == 1


def train(toy, state, place=lambda batch: batch, prepare=False):
    """Three steps of batch 8, then three of batch 16: two shapes."""
    optimizer = AdamWConfig().build(1e-2)
    buckets = ShapeBuckets(make_train_step(toy.loss_fn, optimizer, accumulate=2), donate_argnums=0)
    if prepare:
        for size in (8, 16):
            buckets.prepare(state, abstract(place(toy.batch_of(size))))
    losses = []
    for step, size in enumerate((8, 8, 8, 16, 16, 16)):
        state, metrics = buckets(state, place(toy.batch_of(size, step)))
        losses.append(float(metrics["loss"]))
    return buckets, state, losses


def fresh(toy, sharding=None):
    model = toy.Toy(rngs=nnx.Rngs(0))
    if sharding is not None:
        model = jax.device_put(model, sharding)
    return create_train_state(model, AdamWConfig().build(1e-2), key=jax.random.key(0))


def test_a_training_state_goes_round_without_a_second_compilation(toy):
    buckets, state, losses = train(toy, fresh(toy))
    prepared, other, same = train(toy, fresh(toy), prepare=True)
    assert buckets.num_compilations == prepared.num_compilations == 2
    assert [record.background for record in prepared.compilations] == [True, True]
    assert losses == same
    jax.tree.map(np.testing.assert_array_equal, state.model, other.model)
    jitted = jax.jit(make_train_step(toy.loss_fn, AdamWConfig().build(1e-2), accumulate=2))
    _, metrics = jitted(fresh(toy), toy.batch_of(8, 0))
    assert float(metrics["loss"]) == losses[0]


@pytest.mark.parametrize("spec", [jax.P(), jax.P(None, None)])
def test_placements_on_a_mesh_stay_and_their_spelling_does_not_matter(toy, spec):
    mesh = mesh_of(4, 2)
    place = lambda batch: jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))
    state = fresh(toy, jax.NamedSharding(mesh, jax.P()))

    def respell(x):
        short = len(spec) > x.ndim or jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return x if short else jax.device_put(x, jax.NamedSharding(mesh, spec))

    wanted = jax.tree.map(lambda x: x.sharding, state)
    with jax.set_mesh(mesh):
        buckets, state, losses = train(toy, jax.tree.map(respell, state), place, prepare=True)
    assert buckets.num_compilations == 2
    assert all(
        leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True)
    )
    _, _, alone = train(toy, fresh(toy))
    np.testing.assert_allclose(losses, alone, rtol=1e-5)


def test_sharded_parameters_come_back_sharded():
    mesh = mesh_of(4, 2)
    sharding = jax.NamedSharding(mesh, jax.P("data", "tensor"))

    # The compiler alone would be free to gather the result.
    buckets = ShapeBuckets(lambda w, x: (w - (x.T @ x).sum(), x.mean()), donate_argnums=0)
    w = jax.device_put(jnp.ones((8, 8)), sharding)
    x = jax.device_put(jnp.ones((4, 8)), jax.NamedSharding(mesh, jax.P("data")))
    for _ in range(3):
        w, _ = buckets(w, x)
        assert w.sharding.is_equivalent_to(sharding, 2)
    assert buckets.num_compilations == 1


def test_another_mesh_in_scope_is_another_executable():
    seen = []

    def look(x):
        seen.append(jax.sharding.get_abstract_mesh().shape)
        return x + 1

    mesh = mesh_of(8)
    buckets = ShapeBuckets(look)
    x = jnp.zeros(8)
    buckets(x)
    with jax.set_mesh(mesh):
        buckets.prepare(jax.ShapeDtypeStruct((8,), jnp.float32))
        buckets(x)
    assert buckets.num_compilations == 2
    assert {"data": 8} in [dict(shape) for shape in seen]
    assert buckets.compilations[1].background


def test_arrays_on_another_device_are_followed():
    other = jax.devices()[3]
    out = ShapeBuckets(lambda x: x + 1)(jax.device_put(jnp.zeros(2), other))
    assert out.devices() == {other}


def test_modules_static_attributes_count():
    class Scaled(nnx.Module):
        def __init__(self, factor):
            self.factor = factor
            self.w = nnx.Param(jnp.ones(2))

    buckets = ShapeBuckets(lambda model: model.w.get_value() * model.factor)
    assert [float(buckets(Scaled(factor))[0]) for factor in (2, 3, 2)] == [2.0, 3.0, 2.0]
    assert buckets.num_compilations == 2


def test_close_gives_up_what_has_not_begun():
    begun, release = threading.Event(), threading.Event()

    def slow(x):
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert release.wait(30)
        return x + 1

    buckets = ShapeBuckets(slow)
    buckets.prepare(describe(2))
    buckets.prepare(describe(3))
    assert begun.wait(30)
    threading.Timer(0.05, release.set).start()
    buckets.close()
    assert buckets.num_compilations == 1
    with pytest.raises(RuntimeError, match="closed"):
        buckets.prepare(describe(4))
    # What was given up is compiled at the call.
    for size in (2, 3, 4):
        assert buckets(jnp.zeros(size)).shape == (size,)
    assert [record.background for record in buckets.compilations] == [True, False, False]
