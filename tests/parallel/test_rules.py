import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from effscale.parallel import DEFAULT_RULES, constrain, use_rules
from effscale.parallel.mesh import AXES
from effscale.parallel.rules import Rules, current_rules, logical_spec

MESH = AbstractMesh((2, 2, 2, 2), AXES)

EXPECTED = {
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
    "layers": None,
    "positions": None,
    "batch": ("data", "fsdp", "expert"),
    "seq": None,
    "embed_act": None,
    "heads_act": "tensor",
    "mlp_act": "tensor",
    "vocab_act": "tensor",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_default_rule(name):
    assert logical_spec((name,), (16,), MESH) == P(EXPECTED[name])


def test_no_rule_is_left_out():
    assert set(DEFAULT_RULES) == set(EXPECTED)


def test_names_align_right_and_stacked_dimensions_stay_whole():
    assert logical_spec(("embed", "mlp"), (12, 8, 32), MESH) == P(None, "fsdp", "tensor")


def test_an_axis_is_used_once_the_left_dimension_wins():
    assert logical_spec(("embed", "embed"), (8, 8), MESH) == P("fsdp", None)
    assert logical_spec(("batch", "embed"), (8, 8), MESH) == P(("data", "fsdp", "expert"), None)


def test_an_axis_that_does_not_divide_is_left_out():
    assert logical_spec(("vocab", "embed"), (50257, 8), MESH) == P(None, "fsdp")
    assert logical_spec(("batch",), (6,), MESH) == P("data")


def test_axes_of_size_one_or_absent_are_left_out():
    assert logical_spec(("batch",), (8,), AbstractMesh((4, 1, 1, 2), AXES)) == P("data")
    assert logical_spec(("batch", "mlp_act"), (8, 8), AbstractMesh((4,), ("data",))) == P(
        "data", None
    )


def test_manual_axes_are_left_out():
    types = (AxisType.Manual, AxisType.Auto, AxisType.Auto, AxisType.Auto)
    mesh = AbstractMesh((2, 2, 2, 2), AXES, axis_types=types)
    assert logical_spec(("batch",), (8,), mesh) == P(("fsdp", "expert"))


names = st.sampled_from([None, *EXPECTED])
sizes = st.sampled_from([1, 2, 3, 4, 6, 8])


@given(
    dims=st.lists(st.tuples(names, st.integers(1, 64)), max_size=5),
    extra=st.lists(st.integers(1, 8), max_size=2),
    mesh=st.tuples(sizes, sizes, sizes, sizes),
)
def test_laws(dims, extra, mesh):
    axes, shape = tuple(name for name, _ in dims), (*extra, *(size for _, size in dims))
    mesh = AbstractMesh(mesh, AXES)
    spec = logical_spec(axes, shape, mesh)
    assert len(spec) == len(shape)
    per_dim = [() if e is None else (e,) if isinstance(e, str) else e for e in spec]
    used = [axis for entry in per_dim for axis in entry]
    assert len(used) == len(set(used)), "a mesh axis divides two dimensions"
    for entry, size in zip(per_dim, shape, strict=True):
        assert size % math.prod(mesh.shape[axis] for axis in entry) == 0
    for entry, name in zip(per_dim, (*(None for _ in extra), *axes), strict=True):
        assert set(entry) <= set(DEFAULT_RULES.lookup(name))
    # jax agrees that the spec is possible for this shape.
    jax.sharding.NamedSharding(mesh, spec).shard_shape(shape)


def test_unknown_name_says_the_near_ones():
    with pytest.raises(
        ValueError, match=r"no rule for the logical axis 'embd' \(did you mean 'embed'"
    ):
        logical_spec(("embd",), (8,), MESH)


def test_unknown_mesh_axis_says_the_near_ones():
    rules = DEFAULT_RULES | {"mlp": "tensr"}
    with pytest.raises(
        ValueError, match=r"names 'tensr', which is not an axis of the mesh .*did you mean 'tensor'"
    ):
        logical_spec(("mlp",), (8,), MESH, rules)


def test_more_names_than_dimensions():
    with pytest.raises(
        ValueError,
        match=r"axes must have at most one name for each dimension of the shape \(8,\), got \('embed', 'mlp'\)",
    ):
        logical_spec(("embed", "mlp"), (8,), MESH)


def test_a_rule_with_an_axis_twice():
    with pytest.raises(ValueError, match="the rule for 'batch' must be a mesh axis"):
        Rules({"batch": ("data", "data")})


def test_rules_are_values():
    assert Rules({"a": "data"}) == Rules({"a": ("data",)})
    assert hash(Rules({"a": "data", "b": None})) == hash(Rules({"b": (), "a": "data"}))
    assert Rules({"a": "data"}) != Rules({"a": "fsdp"})
    assert (DEFAULT_RULES | {"seq": "tensor"})["seq"] == ("tensor",)
    assert DEFAULT_RULES["seq"] == ()


def test_use_rules_nests_and_ends():
    inner = DEFAULT_RULES | {"seq": "tensor"}
    with use_rules(inner):
        assert logical_spec(("seq",), (8,), MESH) == P("tensor")
        with use_rules(DEFAULT_RULES):
            assert current_rules() == DEFAULT_RULES
        assert current_rules() == inner
    assert current_rules() is DEFAULT_RULES
    with pytest.raises(ZeroDivisionError), use_rules(inner):
        raise ZeroDivisionError
    assert current_rules() is DEFAULT_RULES


def test_a_jitted_function_follows_the_rules():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    f = jax.jit(lambda x: constrain(x, "seq", "embed_act"))
    x = jnp.ones((8, 8))
    with jax.set_mesh(mesh):
        assert f(x).sharding.is_fully_replicated
        with use_rules(DEFAULT_RULES | {"seq": "tensor"}):
            assert f(x).addressable_shards[0].data.shape == (4, 8)
        assert f(x).sharding.is_fully_replicated
