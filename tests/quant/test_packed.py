"""Packed weights: bytes there and back, and products against the numbers that the codes stand for."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from effscale.models import Affine, Weight, add_lora, matmul, matmuls
from effscale.models.layers import Dense
from effscale.models.weights import dense, take, transpose
from effscale.parallel import MeshConfig, shard
from effscale.quant import Format, pack_weight, quantize
from effscale.quant import packed as packed_module
from effscale.quant.fake import FakeQuantizedWeight
from effscale.quant.formats import pack, stored_bits, unpack
from effscale.quant.packed import PackedWeight
from effscale.training.partition import trainable_mask

TOKENS = Format(granularity="token")
WEIGHTS = [
    Format(),
    Format(granularity="tensor", spread="paper"),
    Format(symmetric=False),
    Format(floating=True),
    Format(bits=4),
    Format(bits=4, granularity="group", group_size=8),
    Format(bits=4, granularity="group", group_size=8, symmetric=False),
    Format(bits=4, granularity="block", num_blocks=3),
    Format(bits=3, symmetric=False),
    Format(bits=2),
    Format(bits=1, granularity="tensor"),
]


@pytest.fixture(params=WEIGHTS, ids=Format.describe)
def format(request):
    return request.param


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@given(st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 3), st.integers(1, 4), st.randoms())
def test_bytes_there_and_back(bits, rows, units, random):
    """Every code comes back, in its share of a byte."""
    allowed = {1: [-1, 1], 2: [-1, 0, 1]}.get(bits, range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    codes = [[random.choice(list(allowed)) for _ in range(8 * units)] for _ in range(rows)]
    codes = jnp.asarray(codes, jnp.int8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, units * stored_bits(bits))
    np.testing.assert_array_equal(unpack(packed, bits), codes)


def test_where_each_code_lies():
    """As documented, for those who read the files: 4 bits in two planes, the first in the low bits; 1 bit in eight."""
    codes = jnp.asarray([1, 2, 3, 4, -1, -2, -3, -4], jnp.int8)
    assert np.asarray(pack(codes, 4)).view(np.uint8).tolist() == [0xF1, 0xE2, 0xD3, 0xC4]
    signs = jnp.asarray([1, -1, 1, 1, -1, -1, -1, 1], jnp.int8)
    assert np.asarray(pack(signs, 1)).view(np.uint8).tolist() == [0b10001101]
    with pytest.raises(
        ValueError, match="must be a multiple of 2 to fill whole bytes with 4-bit codes, got 9"
    ):
        pack(jnp.zeros(9, jnp.int8), 4)


def test_it_is_a_weight(format):
    kernel = normal(0, 24, 6)
    weight = pack_weight(kernel, format)
    assert isinstance(weight, Weight)
    expected = quantize(kernel, format).values()
    assert weight.shape == weight.T.T.shape == (24, 6)
    np.testing.assert_array_equal(dense(weight), expected)
    np.testing.assert_array_equal(dense(transpose(weight)), expected.T)
    ids = jnp.asarray([[2, 0], [23, 5]])
    np.testing.assert_array_equal(take(weight, ids), expected[ids])


def test_a_table_is_quantized_by_rows(format):
    """Its transpose is the kernel of a tied head, and looking up unpacks the rows that are asked for."""
    table = normal(1, 6, 24)
    weight = pack_weight(table, format, is_table=True)
    expected = quantize(table.T, format).values().T
    assert weight.shape == (6, 24)
    np.testing.assert_array_equal(dense(weight), expected)
    ids = jnp.asarray([[2, 0], [5, 5]])
    np.testing.assert_array_equal(take(weight, ids), expected[ids])
    x = normal(2, 4, 24)
    np.testing.assert_allclose(matmul(x, transpose(weight)), x @ expected.T, atol=1e-4)
    np.testing.assert_allclose(matmul(x[:, :6], weight), x[:, :6] @ expected, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(
    "activations",
    [None, TOKENS, Format(granularity="token", symmetric=False), Format(granularity="tensor")],
    ids=["none", "token", "asymmetric", "tensor"],
)
def test_products(format, activations, rows, monkeypatch):
    """Of integers where inputs are quantized: the sum is exact, so nothing but the last rounding may differ."""
    monkeypatch.setattr(packed_module, "WIDE", 6)
    kernel, x, bias = normal(3, 24, 6), normal(4, rows, 24) + 0.5, normal(5, 6)
    weight = pack_weight(kernel, format, activations=activations)
    rounded = x if activations is None else quantize(x, activations).values()
    expected = jax.nn.relu(rounded @ quantize(kernel, format).values() + bias[None])
    found = jax.jit(lambda x, w: matmul(x, w, bias, "relu"))(x, weight)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert matmul(x.astype(jnp.bfloat16), weight, bias).dtype == jnp.bfloat16


def test_integers_are_multiplied_as_integers(format):
    """Where scales allow it, no float of the weight's size is in the compiled program."""
    weight = pack_weight(normal(3, 64, 48), format, activations=TOKENS)
    text = jax.jit(lambda x, w: matmul(x, w)).lower(normal(4, 8, 64), weight).as_text()
    integers = not format.floating and format.granularity != "group"
    assert ("-> tensor<8x48xi32>" in text) == integers
    assert ("tensor<64x48xf32>" in text) == (not integers)


def test_projections_share_one_quantized_input():
    weights = [pack_weight(normal(i, 24, 6), Format(), activations=TOKENS) for i in range(3)]
    x = normal(4, 8, 24)
    together = lambda x: matmuls(x, *map(Affine, weights))
    text = jax.jit(together).lower(x).as_text()
    assert text.count("stablehlo.round_nearest_even") == 1
    for found, weight in zip(together(x), weights, strict=True):
        np.testing.assert_allclose(found, matmul(x, weight), rtol=1e-6)


def test_layers_are_scanned_and_sharded(format):
    """Stacked in front, they come off one by one; divided over devices they give the same."""
    kernel, x = normal(6, 3, 24, 6), normal(7, 4, 24)
    stacked = pack_weight(kernel, format, activations=TOKENS)
    one = jnp.stack([matmul(x, pack_weight(k, format, activations=TOKENS)) for k in kernel])
    run = jax.jit(lambda w: jax.lax.scan(lambda c, layer: (c, matmul(x, layer)), 0, w)[1])
    np.testing.assert_allclose(run(stacked), one, rtol=1e-6, atol=1e-6)
    axes = stacked.partition(("layers", "embed", "mlp"))
    for part, names in ((stacked.data, axes.data), (stacked.scale, axes.scale)):
        assert len(names) == part.ndim


def test_a_sharded_layer():
    layer = Dense(32, 16, rngs=nnx.Rngs(0), axes=("embed", "mlp"))
    layer.kernel.set_value(
        pack_weight(layer.kernel.get_value(), Format(bits=4), activations=TOKENS)
    )
    x = normal(7, 4, 32)
    expected = layer(x)
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).build()
    with jax.set_mesh(mesh):
        placed = shard(layer, mesh)
        assert "tensor" in str(placed.kernel.get_value().data.sharding.spec)
        np.testing.assert_allclose(jax.jit(lambda m, x: m(x))(placed, x), expected, atol=1e-5)


def test_low_rank_pairs_on_top():
    """QLoRA: the packed base stays, and the pair gets a gradient."""
    layer = Dense(32, 16, rngs=nnx.Rngs(0))
    layer.kernel.set_value(pack_weight(layer.kernel.get_value(), Format(bits=4)))
    x, before = normal(8, 4, 32), layer(normal(8, 4, 32))
    tuned = add_lora(layer, rank=2, key=jax.random.key(0))
    np.testing.assert_allclose(tuned(x), before, atol=1e-6)
    pair = tuned.kernel.get_value()
    assert isinstance(pair.base, PackedWeight)
    gradient = jax.grad(lambda b: matmul(x, type(pair)(pair.base, pair.a, b, pair.scale)).sum())(
        pair.b
    )
    assert bool((gradient != 0).any())


def test_fake_quantized_weights_give_the_same(format):
    """What is trained is what will be packed; the gradient is that of the rounded product."""
    kernel, x = normal(9, 24, 6), normal(10, 5, 24)
    fake = FakeQuantizedWeight(kernel, format, TOKENS)
    found, expected = matmul(x, fake), matmul(x, pack_weight(kernel, format, activations=TOKENS))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda k: matmul(x, FakeQuantizedWeight(k, format, TOKENS)).sum())(kernel)
    column = quantize(x, TOKENS).values().sum(0)[:, None]
    np.testing.assert_allclose(gradient, jnp.broadcast_to(column, (24, 6)), rtol=1e-5, atol=1e-5)
    through = jax.grad(lambda x: matmul(x, fake).sum())(x)
    row = quantize(kernel, format).values().sum(1)[None]
    np.testing.assert_allclose(through, jnp.broadcast_to(row, (5, 24)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((24, 6), {"format": TOKENS}, "granularity must be tensor, channel, group or block for weights, got 'token'"),
        ((24, 6), {"format": Format(), "activations": Format()}, "activations: granularity must be token or tensor, got 'channel'"),
        ((20, 6), {"format": Format(bits=1)}, "multiple of 8 to fill whole bytes with 1-bit codes, got 20"),
        ((2**17 + 8, 1), {"format": Format(), "activations": TOKENS}, "may overflow 32 bits"),
    ],
)  # fmt: skip
def test_what_cannot_be_packed(shape, options, message):
    with pytest.raises(ValueError, match=message):
        pack_weight(jnp.ones(shape), **options)


@pytest.mark.parametrize(
    "inputs", [TOKENS, Format(granularity="token", symmetric=False)], ids=Format.describe
)
def test_gradients_pass_through_a_product_of_codes(format, inputs):
    """To what comes before it, as if nothing had been rounded: a LoRA pair in an earlier layer must learn."""
    kernel, x = normal(11, 24, 6), normal(12, 5, 24)
    weight = pack_weight(kernel, format, activations=inputs)
    fake = FakeQuantizedWeight(kernel, format, inputs)
    loss = lambda x, w: (jnp.tanh(matmul(x, w)) ** 2).sum()
    found, expected = jax.jit(jax.grad(loss))(x, weight), jax.grad(loss)(x, fake)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), weight)
    scanned = lambda x: jax.lax.scan(lambda c, w: (c + loss(x, w), None), 0.0, stacked)[0]
    np.testing.assert_allclose(jax.grad(scanned)(x), 2 * expected, rtol=1e-3, atol=1e-4)
    of_weight = jax.grad(lambda w: loss(x, w), allow_int=True)(weight)
    assert not np.asarray(of_weight.scale).any()


def test_packed_and_fake_projections_of_one_input():
    """Each turns the input into a form of its own."""
    kernel, x = normal(13, 24, 6), normal(14, 4, 24)
    packed, fake = (
        pack_weight(kernel, Format(), activations=TOKENS),
        FakeQuantizedWeight(kernel, Format(), TOKENS),
    )
    one, other = matmuls(x, Affine(packed), Affine(fake))
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_no_optimizer_moves_a_packed_weight():
    """Nor decays its scales; what is beside it, and a LoRA on top of it, is trained."""
    weight = pack_weight(normal(0, 8, 8), Format(symmetric=False), activations=TOKENS)
    layer = {"kernel": weight, "bias": jnp.ones(8), "other": Pair(jnp.ones(2), weight)}
    mask = trainable_mask(layer)
    assert mask["bias"]
    assert mask["other"].a
    assert not any(jax.tree.leaves((mask["kernel"], mask["other"].base)))
    with pytest.raises(ValueError, match="must match at least one trainable leaf"):
        trainable_mask({"kernel": weight})


class Pair(NamedTuple):
    """As a LoRA holds its base."""

    a: jax.Array
    base: PackedWeight
