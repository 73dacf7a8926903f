"""The weight protocol, shown on a packed weight that this file defines."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from effscale.generation import SamplingConfig, generate
from effscale.models import (
    Affine,
    Dense,
    LoRA,
    Weight,
    add_lora,
    finish,
    map_weights,
    matmul,
    matmuls,
    merge_lora,
    unmerge_lora,
)
from effscale.models.activations import ACTIVATIONS
from effscale.models.layers import Embedding
from effscale.models.weights import dense, take, transpose
from effscale.parallel import MeshConfig, shard, shardings
from effscale.training import next_token_loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """A matrix as int8 with one float32 step a column (after ``T``: a row)."""

    codes: Any
    step: Any
    compute: Any = dataclasses.field(default=jnp.dtype("float32"), metadata={"static": True})

    @property
    def shape(self):
        return self.codes.shape

    @property
    def dtype(self):
        return self.compute

    @property
    def T(self):
        return type(self)(self.codes.mT, self.step.mT, self.compute)

    def astype(self, dtype):
        return type(self)(self.codes, self.step, jnp.dtype(dtype))

    def dense(self):
        return (self.codes.astype(jnp.float32) * self.step).astype(self.compute)

    def matmul(self, x, bias, activation):
        return finish(x @ self.dense(), bias, activation)

    def take(self, indices):
        rows = jnp.take(self.codes, indices.reshape(-1), axis=0).astype(jnp.float32)
        step = (
            self.step
            if self.step.shape[0] == 1
            else jnp.take(self.step, indices.reshape(-1), axis=0)
        )
        return (rows * step).astype(self.compute).reshape(*indices.shape, -1)

    def partition(self, axes):
        return Int8(axes, (None, axes[1]), self.compute)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Dot(Int8):
    """The same, never made dense. Where its step is of columns the input's rows become codes and a step, too."""

    prepared: ClassVar[list] = []  # shapes of the inputs turned into codes

    @property
    def input_form(self):
        return None if self.step.shape[-1] == 1 else "int8 per row"

    def prepare(self, x):
        assert self.dtype == x.dtype
        self.prepared.append(x.shape)
        step = jnp.abs(x).max(-1, keepdims=True) / 127
        return jnp.round(x / step).astype(jnp.int8), step

    def matmul(self, x, bias, activation):
        if self.input_form is None:  # a transposed table
            y = (x * self.step.mT) @ self.codes.astype(x.dtype)
        else:
            codes, step = x
            sums = jax.lax.dot(codes, self.codes, preferred_element_type=jnp.int32)
            y = sums.astype(self.dtype) * step * self.step.astype(self.dtype)
        return finish(y, bias, activation)

    def dense(self):
        raise AssertionError("made dense")


def pack_dot(weight):
    packed = pack(weight)
    return Int8Dot(packed.codes, packed.step)


def pack(weight):
    step = jnp.abs(weight).max(-2, keepdims=True) / 127
    return Int8(jnp.round(weight / step).astype(jnp.int8), step)


def rounded(weight):
    return pack(weight).dense()


run = jax.jit(lambda model, ids: model(ids))


def test_it_is_a_weight(getkey):
    assert isinstance(pack(jax.random.normal(getkey(), (4, 6))), Weight)
    assert not isinstance(jnp.ones((2, 3)), Weight)


def test_free_functions_on_packed_and_plain_weights(getkey):
    weight = jax.random.normal(getkey(), (4, 6))
    ids = jnp.array([[3, 0], [1, 1]])
    for packed, plain in (
        (pack(weight), rounded(weight)),
        (weight, weight),
        (np.asarray(weight), weight),
    ):
        np.testing.assert_array_equal(dense(packed), plain)
        np.testing.assert_array_equal(take(packed, ids), np.asarray(plain)[np.asarray(ids)])
        np.testing.assert_array_equal(dense(transpose(packed)), plain.T)


def test_dense_layer(getkey):
    layer = Dense(4, 6, rngs=nnx.Rngs(0))
    x = jax.random.normal(getkey(), (2, 3, 4))
    packed, exact = map_weights(layer, pack), map_weights(layer, rounded)
    np.testing.assert_allclose(packed(x), exact(x), atol=1e-7)
    assert packed(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert isinstance(layer.kernel.get_value(), jax.Array)  # the original is as it was


def test_projections_of_one_input_prepare_it_once(getkey):
    keys = [getkey() for _ in range(4)]
    x = jax.random.normal(keys[0], (2, 3, 4))
    query, value = (jax.random.normal(key, (4, 6)) for key in keys[1:3])
    bias = jax.random.normal(keys[3], (6,))
    affines = (query, None, None), (value, bias, "silu")
    pack_affine = lambda weight, *rest: Affine(pack_dot(weight), *rest)
    Int8Dot.prepared.clear()
    found = matmuls(x, *(pack_affine(*affine) for affine in affines))
    assert Int8Dot.prepared == [(6, 4)]
    in_bfloat16 = matmuls(x.astype(jnp.bfloat16), *(pack_affine(*affine) for affine in affines))
    assert {y.dtype for y in in_bfloat16} == {jnp.dtype("bfloat16")}
    for y, (weight, *rest) in zip(found, affines, strict=True):
        np.testing.assert_array_equal(y, matmul(x, pack_dot(weight), *rest))
        np.testing.assert_allclose(y, matmul(x, weight, *rest), atol=0.1)
    Int8Dot.prepared.clear()
    mixed = matmuls(x, Affine(pack(query)), Affine(value, bias, "silu"))  # no form in common
    np.testing.assert_array_equal(mixed[0], matmul(x, pack(query)))
    np.testing.assert_array_equal(
        mixed[1], ACTIVATIONS["silu"](x.reshape(6, 4) @ value + bias[None]).reshape(2, 3, 6)
    )
    assert not Int8Dot.prepared


def test_an_epilogue_reaches_the_weights_own_product(tiny, tokens):
    """A gated and a plain feed-forward hand activation and bias over; attention and a gated one share their input."""
    for name, products in (("llama", 4), ("gpt2", 4)):
        model = map_weights(tiny(name), pack_dot)
        Int8Dot.prepared.clear()
        logits = run.__wrapped__(model, tokens(model.config))
        head = 0 if name == "gpt2" else 1  # llama's is not tied: a dense layer
        assert len(Int8Dot.prepared) == products + head
        plain = tiny(name)(tokens(model.config))
        assert float(jnp.abs(logits - plain).max()) < 0.3 * float(jnp.abs(plain).max())


def test_loss_and_generation_never_make_a_packed_table_dense(tiny, tokens):
    """The table is the tied head's weight, too."""
    model, table = tiny("gpt2"), r"tokens\.embedding"
    ids = tokens(model.config)
    batch = {"input_ids": ids, "labels": jnp.roll(ids, -1, 1).at[:, 0].set(-100)}
    packed, exact = (map_weights(model, f, table) for f in (pack_dot, rounded))
    scale = exact.final_norm.scale.get_value()

    @jax.jit
    def loss(scale, model):
        model = map_weights(model, lambda _: scale, r"final_norm\.scale")
        return next_token_loss(model, batch, z_loss=1e-3).total

    for found, wanted in zip(
        *(jax.value_and_grad(loss)(scale, m) for m in (packed, exact)), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    config = SamplingConfig(max_new_tokens=3, temperature=0.0)
    found, wanted = (generate(m, ids, config).tokens for m in (packed, exact))
    np.testing.assert_array_equal(found, wanted)


def test_a_divided_packed_table_is_looked_up_where_other_axes_are_manual(getkey):
    """As in per_worker: every array of the table is made whole first, since XLA's partitioner can die of a divided one."""
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).build()
    table = map_weights(Embedding(8, 4, rngs=nnx.Rngs(0)), pack_dot, "embedding")
    ids = jax.random.randint(getkey(), (4, 3), 0, 8)
    with jax.set_mesh(mesh):
        specs = {"in_specs": (P(), P("data")), "out_specs": P("data"), "axis_names": {"data"}}
        look_up = jax.jit(jax.shard_map(lambda table, ids: table(ids), **specs))
        placed = shard(table, mesh)
        assert str(look_up.trace(placed, ids).jaxpr).count(" sharding_constraint[") == 2
        found = look_up(placed, ids)
    np.testing.assert_array_equal(found, table(ids))


def test_lora_keeps_every_leading_axis():
    pair = LoRA(jnp.ones((3, 4, 6)), jnp.ones((3, 4, 2)), jnp.ones((3, 2, 6)), 1.0)
    parts = pair.partition(("experts", "embed", "mlp"))
    assert parts.base == ("experts", "embed", "mlp")
    assert parts.a == ("experts", "embed", None)
    assert parts.b == ("experts", None, "mlp")
    x = jnp.ones((3, 5, 4))
    np.testing.assert_allclose(jax.vmap(matmul)(x, pair), x @ pair.dense(), rtol=1e-6)


def test_embedding_and_tied_logits(getkey):
    table = Embedding(9, 4, rngs=nnx.Rngs(0))
    packed, exact = (map_weights(table, f, "embedding") for f in (pack, rounded))
    ids = jnp.array([[8, 0, 3]])
    np.testing.assert_allclose(packed(ids), exact(ids), atol=1e-7)
    x = jax.random.normal(getkey(), (2, 4))
    np.testing.assert_allclose(packed.attend(x), exact.attend(x), atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "opt-350m", "neox", "llama"])
def test_scanned_model_under_jit(name, tiny, tokens):
    model = tiny(name)
    ids = tokens(model.config)
    everything = r"kernel$|tokens\.embedding$"
    packed, exact = map_weights(model, pack, everything), map_weights(model, rounded, everything)
    codes = [leaf for leaf in jax.tree.leaves(packed) if leaf.dtype == jnp.int8]
    assert sum(leaf.size for leaf in codes) > 0.8 * sum(
        leaf.size for leaf in jax.tree.leaves(model)
    )
    np.testing.assert_allclose(run(packed, ids), run(exact, ids), atol=1e-4)
    assert float(jnp.abs(run(packed, ids) - run(model, ids)).max()) > 1e-4


def test_gradients_of_the_others_pass_through(tiny, tokens):
    model = tiny("gpt2")
    ids = tokens(model.config)
    packed, exact = map_weights(model, pack), map_weights(model, rounded)

    @jax.jit
    def gradient(model):
        leaves, tree = jax.tree.flatten(model)
        floats = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

        def loss(trained):
            trained = iter(trained)
            merged = [
                next(trained) if is_float else leaf
                for is_float, leaf in zip(floats, leaves, strict=True)
            ]
            return jax.nn.logsumexp(jax.tree.unflatten(tree, merged)(ids), -1).sum()

        grads = iter(
            jax.grad(loss)(
                [leaf for is_float, leaf in zip(floats, leaves, strict=True) if is_float]
            )
        )
        return jax.tree.unflatten(tree, [next(grads) if is_float else None for is_float in floats])

    found, wanted = gradient(packed), gradient(exact)
    for path in (
        "embed.tokens.embedding",
        "final_norm.scale",
        "groups.0.blocks.0.attention.query.bias",
    ):
        a, b = found, wanted
        for part in path.split("."):
            a, b = (x[int(part)] if part.isdigit() else getattr(x, part) for x in (a, b))
        np.testing.assert_allclose(a[...], b[...], atol=1e-4, rtol=1e-4)


def test_lora_on_a_packed_base(tiny, tokens, getkey):
    packed = map_weights(tiny("llama"), pack, r"attention\..*kernel")
    adapted = add_lora(packed, rank=2, key=getkey(), where=r"attention\..*kernel")
    ids = tokens(packed.config)
    np.testing.assert_array_equal(run(adapted, ids), run(packed, ids))
    back = unmerge_lora(adapted)
    assert jax.tree.structure(back) == jax.tree.structure(packed)
    np.testing.assert_allclose(run(merge_lora(adapted), ids), run(packed, ids), atol=1e-4)


def test_shapes_gradient_placeholders_and_shardings_may_stand_in_a_weight(tiny, getkey):
    model = add_lora(map_weights(tiny("gpt2"), pack), rank=2, key=getkey())
    shapes = jax.eval_shape(lambda: model)
    assert jax.tree.structure(shapes) == jax.tree.structure(model)
    assert jax.tree.leaves(jax.tree.map(lambda leaf: None, model)) == []
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).build()
    kernel = shardings(model, mesh).groups[0].blocks[0].feed_forward.up.kernel.get_value()
    spec = lambda sharding: tuple(sharding.spec)
    assert spec(kernel.base.codes) == (None, "fsdp", "tensor")
    assert spec(kernel.base.step) == (None, None, "tensor")
    assert spec(kernel.a)[:2] == (None, "fsdp")
    assert spec(kernel.b)[2] == "tensor"


def test_map_weights_chooses_by_path(tiny):
    model = tiny("gpt2")
    seen = []

    def note(weight):
        seen.append(weight.shape)
        return weight

    map_weights(model, note)
    assert sorted(seen) == sorted(
        [(2, 24, 24)] * 4 + [(2, 24, 96), (2, 96, 24)]
    )  # a stacked group at once
    seen.clear()
    map_weights(model, note, r"feed_forward\.up")
    assert seen == [(2, 96), (2, 24, 96)]
    seen.clear()
    map_weights(model, note, lambda path: path == "embed.tokens.embedding")
    assert seen == [(37, 24)]


def test_map_weights_keeps_logical_axes_and_shares_the_rest(tiny):
    model = tiny("gpt2")
    changed = map_weights(model, lambda w: w + 1, r"query\.kernel")
    before, after = (m.groups[0].blocks[0].attention for m in (model, changed))
    assert after.query.kernel.get_metadata("axes") == ("embed", "heads")
    np.testing.assert_array_equal(after.query.kernel[...], before.query.kernel[...] + 1)
    assert after.key.kernel.get_value() is before.key.kernel.get_value()


def test_map_weights_that_match_nothing(tiny):
    with pytest.raises(
        ValueError,
        match=r"where='qurey' matches no parameter; did you mean 'query'\?",
    ):
        map_weights(tiny("gpt2"), pack, "qurey")
