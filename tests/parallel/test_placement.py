import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from effscale.parallel import (
    DEFAULT_RULES,
    MeshConfig,
    batch_shard,
    batch_sharding,
    constrain,
    shard,
    shard_batch,
    shardings,
    use_rules,
)
from effscale.parallel.mesh import AXES
from effscale.parallel.placement import BatchShard
from effscale.parallel.rules import current_rules


class Dense(nnx.Module):
    def __init__(self, inner, outer, *, rngs):
        self.kernel = nnx.Param(
            jax.random.normal(rngs.params(), (inner, outer)), axes=("embed", "mlp")
        )
        self.bias = nnx.Param(jnp.zeros(outer), axes=("mlp",))
        self.scale = nnx.Param(jnp.ones(()))


class Net(nnx.Module):
    def __init__(self, *, rngs):
        self.first = Dense(8, 16, rngs=rngs)
        self.blocks = jax.vmap(lambda r: Dense(8, 16, rngs=r))(rngs.split(3))


@pytest.fixture
def mesh():
    return MeshConfig(data=2, fsdp=2, tensor=2).build()


def make(key=None):
    return Net(rngs=nnx.Rngs(jax.random.key(0) if key is None else key))


def specs(tree, mesh):
    found = shardings(tree, mesh)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    return {
        jax.tree_util.keystr(path).removesuffix(".value"): s.spec
        for path, s in jax.tree_util.tree_leaves_with_path(found)
    }


EXPECTED = {
    ".first.kernel": P("fsdp", "tensor"),
    ".first.bias": P("tensor"),
    ".first.scale": P(),
    ".blocks.kernel": P(None, "fsdp", "tensor"),
    ".blocks.bias": P(None, "tensor"),
    ".blocks.scale": P(None),
}


def test_a_module(mesh):
    assert specs(make(), mesh) == EXPECTED


@pytest.mark.parametrize(
    "through",
    [
        lambda m: jax.tree.map(lambda x: x * 2, m),
        jax.jit(lambda m: m),
        jax.grad(lambda m: jnp.sum(m.first.kernel[...])),
        lambda m: jax.eval_shape(make),
        lambda m: nnx.merge(*nnx.split(m)),
    ],
    ids=["tree.map", "jit", "grad", "eval_shape", "split-merge"],
)
def test_the_metadata_survives(mesh, through):
    assert specs(through(make()), mesh) == EXPECTED


def test_optimizer_states_lie_like_the_parameters(mesh):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    found = specs(jax.eval_shape(lambda: optimizer.init(make())), mesh)
    for moment in ("mu", "nu"):
        for path, spec in EXPECTED.items():
            assert found[f"[1][0].{moment}{path}"] == spec
    assert found["[1][0].count"] == P()


def test_statistics_of_fewer_dimensions_are_replicated(mesh):
    optimizer = optax.adafactor(min_dim_size_to_factor=4)
    state = jax.eval_shape(lambda: optimizer.init(make()))
    found = specs(state, mesh)
    rows = {path: spec for path, spec in found.items() if "v_row.first.kernel" in path}
    assert list(rows.values()) == [P(None)]


def test_bare_arrays_keys_and_numbers_are_replicated(mesh):
    tree = {"step": jnp.int32(3), "key": jax.random.key(0), "array": np.ones((8, 8)), "none": None}
    assert set(specs(tree, mesh).values()) == {P(), P(None, None)}
    placed = shard(tree, mesh)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(placed))
    assert jax.random.key_data(placed["key"]).tolist() == jax.random.key_data(tree["key"]).tolist()


def test_masked_parameters_have_no_arrays(mesh):
    optimizer = optax.masked(
        optax.sgd(0.1, momentum=0.9), lambda m: jax.tree.map(lambda x: x.ndim > 1, m)
    )
    found = specs(optimizer.init(make()), mesh)
    assert {spec for path, spec in found.items() if "first" in path} == {P("fsdp", "tensor")}


def test_parameters_sharded_from_birth(mesh):
    places = shardings(jax.eval_shape(make), mesh)
    born = jax.jit(make, out_shardings=places)()
    assert born.first.kernel[...].addressable_shards[0].data.shape == (4, 8)
    moved = shard(make(), mesh)
    assert moved.blocks.kernel[...].sharding == born.blocks.kernel[...].sharding
    np.testing.assert_allclose(moved.blocks.kernel[...], born.blocks.kernel[...], rtol=1e-6)


def test_from_one_mesh_to_another(mesh):
    first = shard(make(), MeshConfig().build(jax.devices()[:1]))
    second = shard(shard(first, mesh), MeshConfig(data=1, tensor=8).build())
    assert second.first.kernel[...].sharding.spec == P(None, "tensor")
    np.testing.assert_array_equal(second.first.kernel[...], make().first.kernel[...])


def test_an_abstract_mesh_does():
    assert specs(jax.eval_shape(make), AbstractMesh((1, 4, 1, 1), AXES))[".first.kernel"] == P(
        "fsdp", None
    )


def test_the_rules_are_those_in_force(mesh):
    with use_rules(DEFAULT_RULES | {"embed": None}):
        assert specs(make(), mesh)[".first.kernel"] == P(None, "tensor")
    assert current_rules() == DEFAULT_RULES


def test_a_tree_moves_from_the_layout_of_one_table_to_that_of_another(mesh):
    """Weights, batches and what the program computes follow the same table."""
    rules = {"batch": "data", "embed": None, "mlp": ("fsdp", "tensor")}
    wide = DEFAULT_RULES | rules | {"mlp_act": ("fsdp", "tensor")}
    narrow = shard(make(), mesh)
    activations = jax.jit(lambda net, x: constrain(x @ net.first.kernel[...], "batch", "mlp_act"))
    rows = np.ones((8, 8), np.float32)
    with jax.set_mesh(mesh), use_rules(wide):
        moved = shard(narrow, mesh)
        assert moved.first.kernel[...].sharding.spec == P(None, ("fsdp", "tensor"))
        batch = shard_batch(rows, mesh)
        assert batch.sharding == batch_sharding(mesh) == NamedSharding(mesh, P("data"))
        assert batch_shard(mesh) == (0, 1)
        assert activations(moved, batch).sharding.spec == P("data", ("fsdp", "tensor"))
    np.testing.assert_array_equal(moved.first.kernel[...], narrow.first.kernel[...])
    with jax.set_mesh(mesh):
        again = shard(moved, mesh)
        assert again.first.kernel[...].sharding == narrow.first.kernel[...].sharding
        assert batch_sharding(mesh).spec == P(("data", "fsdp"))
        assert activations(again, batch).sharding.spec == P(("data", "fsdp"), "tensor")


def test_a_misspelt_axis_names_the_parameter(mesh):
    tree = {"w": nnx.Param(jnp.ones((8, 8)), axes=("embed", "mpl"))}
    with pytest.raises(
        ValueError, match=r"\['w'\]: no rule for the logical axis 'mpl' \(did you mean 'mlp'"
    ):
        shardings(tree, mesh)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraPair:
    base: jax.Array
    a: jax.Array
    b: jax.Array

    def partition(self, axes):
        return LoraPair(axes, (axes[0], None), (None, axes[1]))


class Scaled(NamedTuple):
    q: jax.Array
    scale: jax.Array


class Wrong(LoraPair):
    def partition(self, axes):
        return axes


jax.tree_util.register_dataclass(Wrong, ["base", "a", "b"], [])


@pytest.mark.parametrize("lead", [(), (3,)], ids=["plain", "stacked"])
def test_a_weight_that_says_how_it_divides(mesh, lead):
    weight = LoraPair(jnp.ones((*lead, 8, 16)), jnp.ones((*lead, 8, 4)), jnp.ones((*lead, 4, 16)))
    found = specs({"w": nnx.Param(weight, axes=("embed", "mlp"))}, mesh)
    rest = (None,) * len(lead)
    assert found == {
        "['w'].value.base": P(*rest, "fsdp", "tensor"),
        "['w'].value.a": P(*rest, "fsdp", None),
        "['w'].value.b": P(*rest, None, "tensor"),
    }
    placed = shard({"w": nnx.Param(weight, axes=("embed", "mlp"))}, mesh)["w"].get_value()
    assert placed.b.addressable_shards[0].data.shape == (*lead, 4, 8)


def test_the_moments_of_a_weight_of_which_a_part_is_frozen(mesh):
    """The frozen part has none."""
    weight = LoraPair(None, jnp.ones((8, 4)), jnp.ones((4, 16)))
    found = specs({"w": nnx.Param(weight, axes=("embed", "mlp"))}, mesh)
    assert found == {"['w'].value.a": P("fsdp", None), "['w'].value.b": P(None, "tensor")}


def test_a_weight_that_does_not_say(mesh):
    weight = Scaled(jnp.ones((8, 16), jnp.int8), jnp.ones((1, 16)))
    found = specs({"w": nnx.Param(weight, axes=("embed", "mlp"))}, mesh)
    assert list(found.values()) == [P("fsdp", "tensor"), P(None, "tensor")]


def test_a_weight_without_axes_is_replicated(mesh):
    weight = LoraPair(jnp.ones((8, 16)), jnp.ones((8, 4)), jnp.ones((4, 16)))
    assert set(specs({"w": nnx.Param(weight)}, mesh).values()) == {P(None, None)}


def test_a_weight_that_says_it_wrongly(mesh):
    weight = Wrong(jnp.ones((8, 16)), jnp.ones((8, 4)), jnp.ones((4, 16)))
    with pytest.raises(ValueError, match=r"\['w'\]: Wrong\.partition.* for 3 arrays"):
        shardings({"w": nnx.Param(weight, axes=("embed", "mlp"))}, mesh)


def test_a_batch_is_divided_by_rows(mesh):
    batch = {
        "input_ids": np.arange(8 * 5, dtype=np.int32).reshape(8, 5),
        "weight": np.float32(2.0),
        "loss_weights": np.ones(8, np.float32),
    }
    placed = shard_batch(batch, mesh)
    assert placed["input_ids"].sharding == batch_sharding(mesh)
    assert placed["input_ids"].sharding.spec == P(("data", "fsdp"))
    assert placed["input_ids"].addressable_shards[0].data.shape == (2, 5)
    assert placed["weight"].sharding.is_fully_replicated
    for name, array in batch.items():
        np.testing.assert_array_equal(placed[name], array)
        assert placed[name].dtype == array.dtype


def test_one_process_loads_everything(mesh):
    assert batch_shard(mesh) == BatchShard(0, 1)


def test_a_mesh_without_batch_axes_replicates():
    mesh = MeshConfig(data=1, tensor=8).build()
    assert shard_batch({"x": np.ones((3, 2))}, mesh)["x"].sharding.is_fully_replicated


def test_a_batch_that_the_mesh_cannot_divide(mesh):
    message = r"a global batch of 6 rows cannot be divided over 4 devices \(data 2 x fsdp 2\)\. .*multiple of 4"
    with pytest.raises(ValueError, match=message):
        shard_batch({"x": np.ones((6, 2))}, mesh)


def test_arrays_of_different_numbers_of_rows(mesh):
    with pytest.raises(
        ValueError, match=r"must have the same number of rows, got \{.*'a'.*8.*'b'.*4"
    ):
        shard_batch({"a": np.ones(8), "b": np.ones(4)}, mesh)


class FakeDevice(NamedTuple):
    id: int
    process_index: int


@pytest.mark.parametrize(
    ("shape", "processes", "mine", "expected"),
    [
        ((4, 1, 1, 2), [0, 0, 0, 0, 1, 1, 1, 1], 1, (1, 2)),
        ((1, 1, 1, 8), [0, 0, 0, 0, 1, 1, 1, 1], 1, (0, 1)),
        ((2, 1, 1, 4), [0, 0, 1, 1, 2, 2, 3, 3], 3, (1, 2)),
        ((2, 4, 1, 1), [0, 1, 0, 1, 0, 1, 0, 1], 1, (1, 2)),
    ],
    ids=["rows", "tensor spans", "groups", "interleaved"],
)
def test_what_each_of_several_processes_loads(monkeypatch, shape, processes, mine, expected):
    mesh = fake_mesh(monkeypatch, shape, processes, mine)
    assert batch_shard(mesh) == expected


def test_processes_whose_rows_overlap(monkeypatch):
    mesh = fake_mesh(monkeypatch, (4, 1, 1, 2), [0, 0, 0, 1, 1, 1, 1, 1], 0)
    with pytest.raises(ValueError, match="overlapping or unequal parts"):
        batch_shard(mesh)


def fake_mesh(monkeypatch, shape, processes, mine):
    """A mesh over the real devices whose processes are made up."""
    mesh = jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    real = jax.NamedSharding.devices_indices_map

    def devices_indices_map(self, global_shape):
        found = real(self, global_shape)
        return {FakeDevice(d.id, processes[d.id]): index for d, index in found.items()}

    monkeypatch.setattr(jax.NamedSharding, "devices_indices_map", devices_indices_map)
    monkeypatch.setattr(jax, "process_index", lambda: mine)
    return mesh
