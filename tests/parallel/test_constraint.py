import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from effscale.parallel import MeshConfig, constrain


def num_constraints(f, *args):
    return str(jax.make_jaxpr(f)(*args)).count("sharding_constraint")


@pytest.fixture
def mesh():
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).build()
    with jax.set_mesh(mesh):
        yield mesh


def hidden(x):
    return constrain(x, "batch", "mlp_act")


def test_without_a_mesh_it_is_the_same_object():
    x = jnp.ones((8, 8))
    assert hidden(x) is x
    assert num_constraints(hidden, x) == 0


def test_on_one_device_it_is_the_same_object():
    x = jnp.ones((8, 8))
    with jax.set_mesh(MeshConfig().build(jax.devices()[:1])):
        assert hidden(x) is x


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_the_result_lies_as_named(mesh, wrap):
    y = wrap(hidden)(jnp.ones((8, 8)))
    assert y.sharding.is_equivalent_to(jax.NamedSharding(mesh, P(("data", "fsdp"), "tensor")), 2)


def test_dimensions_that_do_not_divide_stay_whole(mesh):
    y = jax.jit(hidden)(jnp.ones((6, 7)))
    assert y.sharding.is_equivalent_to(jax.NamedSharding(mesh, P("data", None)), 2)


@pytest.mark.parametrize("names", [(), ("batch",), ("batch", None, None)])
def test_one_name_a_dimension(names):
    with pytest.raises(
        ValueError,
        match=r"names must have one entry for each dimension of an array of shape \(8, 8\), got",
    ):
        constrain(jnp.ones((8, 8)), *names)


def test_a_misspelt_name_is_an_error_without_a_mesh():
    with pytest.raises(ValueError, match="did you mean 'mlp_act'"):
        constrain(jnp.ones((8, 8)), "batch", "mlp_actt")


def test_gradient_vmap_scan_checkpoint(mesh):
    def loss(w, x):
        @jax.checkpoint
        def body(h, layer):
            return hidden(jnp.tanh(h @ layer)), None

        return jnp.sum(jax.lax.scan(body, x, w)[0] ** 2)

    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(3, 8, 8)), "float32")
    x = jnp.asarray(rng.normal(size=(4, 8, 8)), "float32")
    grads = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(w, x)

    def plain(w, x):
        for layer in w:
            x = jnp.tanh(x @ layer)
        return jnp.sum(x**2)

    expected = jax.vmap(jax.grad(plain), in_axes=(None, 0))(w, x)
    np.testing.assert_allclose(grads, expected, rtol=1e-4, atol=1e-5)
    assert num_constraints(jax.grad(loss), w, x[0]) > 0


def test_inside_shard_map_only_automatic_axes_count(mesh, monkeypatch):
    specs, real = [], jax.lax.with_sharding_constraint
    spy = lambda x, spec: specs.append(spec) or real(x, spec)
    monkeypatch.setattr(jax.lax, "with_sharding_constraint", spy)

    @jax.shard_map(mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names={"data"})
    def f(x):
        assert jax.sharding.get_abstract_mesh().axis_types[0] == AxisType.Manual
        return hidden(x) * 2

    x = jnp.arange(64, dtype="float32").reshape(8, 8)
    np.testing.assert_array_equal(jax.jit(f)(x), x * 2)
    assert specs == [P("fsdp", "tensor")]


def test_where_all_axes_are_manual_it_does_nothing(mesh):
    f = jax.shard_map(hidden, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    x = jnp.ones((8, 8))
    assert num_constraints(f, x) == 0
    np.testing.assert_array_equal(jax.jit(f)(x), x)


def test_explicit_axes_are_left_to_the_types():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        assert num_constraints(hidden, jnp.ones((8, 8))) == 0
