"""Recipes on whole models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effscale.generation import SamplingConfig, generate
from effscale.models import MLPConfig, Transformer, add_lora, bert, gpt2, is_adapter
from effscale.models.layers import Dense
from effscale.moe import MoEConfig, with_experts
from effscale.quant import (
    Format,
    Recipe,
    Rule,
    dequantize_model,
    fake_quantize_model,
    quantize_model,
    w1a8,
    w2a8,
    w4a8,
    w4a16,
    w8a8,
)
from effscale.quant.packed import PackedWeight
from effscale.training import Checkpoints, create_train_state, make_train_step, next_token_loss
from effscale.training.partition import combine, partition

IDS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 16)), jnp.int32)
CONFIG = gpt2(num_layers=4, d_model=32, num_heads=2, vocab_size=64, max_length=32)
run = jax.jit(lambda model, ids: model(ids))


@pytest.fixture(scope="module")
def model():
    return Transformer(CONFIG, rngs=nnx.Rngs(0))


def formats(model):
    """The formats of the quantized weights, by path."""
    flat = nnx.to_flat_state(nnx.state(model))
    weights = {".".join(map(str, path)): v.get_value() for path, v in flat}
    return {k: w.format.bits for k, w in weights.items() if isinstance(w, PackedWeight)}


@pytest.mark.parametrize(
    ("recipe", "error"),
    [
        (w8a8(), 0.02),
        (w4a8(16), 0.3),
        (w4a16(), 0.3),
        (w1a8(), 2.0),
        pytest.param(w4a8(), 0.3, marks=pytest.mark.slow),
        pytest.param(w2a8(), 2.0, marks=pytest.mark.slow),
    ],
    ids=["w8a8", "w4a8-16", "w4a16", "w1a8", "w4a8", "w2a8"],
)
def test_the_papers_recipes(model, recipe, error):
    """Packed, trained and dequantized they compute the same, up to the rounding of inputs, near the model's own logits."""
    packed, fake = quantize_model(model, recipe), fake_quantize_model(model, recipe)
    found, exact = run(packed, IDS), run(model, IDS)
    np.testing.assert_allclose(found, run(fake, IDS), atol=2e-2 * float(jnp.abs(exact).max()))
    distance = jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)
    assert 0 < distance < error
    layers = [bits for path, bits in formats(packed).items() if path.startswith("groups")]
    assert len(layers) == 6
    assert set(layers) <= {1, 2, 4, 8}
    if all(rule.activations is None for rule in recipe.rules):
        np.testing.assert_allclose(run(dequantize_model(packed), IDS), found, atol=1e-5)
    np.testing.assert_array_equal(run(model, IDS), exact)  # the original is as it was


def test_bits_by_layer_split_the_group(model):
    """The first and the last layer in 8 bits, those between in 4: three groups, and every layer what it would be alone."""
    ends = Rule(where=r"layers\.(0|3)\..*kernel", weights=Format())
    recipe = Recipe((ends, Rule(where=r"layers\..*kernel", weights=Format(bits=4))))
    packed = quantize_model(model, recipe)
    assert [group.repeat for group in packed.config.groups] == [1, 2, 1]
    bits = formats(packed)
    assert {b for path, b in bits.items() if path.startswith("groups.1")} == {4}
    assert {b for path, b in bits.items() if not path.startswith("groups.1")} == {8}
    kernel = lambda m, group: m.groups[group].blocks[0].feed_forward.up.kernel.get_value()
    whole = quantize_model(
        model, Recipe((Rule(where=r"layers\..*kernel", weights=Format(bits=4)),))
    )
    np.testing.assert_array_equal(kernel(packed, 1).data, kernel(whole, 0).data[1:3])


def test_routers_stay_in_float_unless_named():
    """In a model of one's own as well, and in stacks."""
    experts = MoEConfig(num_experts=2, expert=MLPConfig(d_ff=8), shared=MLPConfig(d_ff=8))
    config = gpt2(num_layers=2, d_model=16, num_heads=2, vocab_size=8, max_length=8)
    model = Transformer(with_experts(config, experts, every=1), rngs=nnx.Rngs(0))
    eights = lambda where: Recipe((Rule(where=where, weights=Format()),))

    def packed(model, where):
        state = nnx.to_flat_state(nnx.state(quantize_model(model, eights(where))))
        return {path[-2] for path, v in state if isinstance(v.get_value(), PackedWeight)}

    everything = packed(model, r"layers\..*kernel")
    assert "up" in everything
    assert not everything & {"logits", "coefficient"}
    assert packed(model.groups[0].blocks[0].feed_forward, "kernel") == {"up", "down"}
    assert packed(model, r"router|coefficient") == {"logits", "coefficient"}
    with pytest.raises(ValueError, match=r"must contain 'router' to select layers\.0\..*logits"):
        quantize_model(model, eights(r"logits\.kernel"))


def test_pairs_of_blocks_stay_pairs():
    """Where every second layer gets other bits, a stack of pairs needs no split."""
    config = gpt2(num_layers=4, d_model=32, num_heads=2, vocab_size=64, max_length=32)
    block = config.groups[0].blocks[0]
    wide = dataclasses.replace(block, feed_forward=dataclasses.replace(block.feed_forward, d_ff=64))
    group = dataclasses.replace(config.groups[0], blocks=(block, wide), repeat=2)
    model = Transformer(dataclasses.replace(config, groups=(group,)), rngs=nnx.Rngs(0))
    assert isinstance(wide.feed_forward, MLPConfig)
    odd = Rule(where=r"layers\.[13]\..*kernel", weights=Format(bits=4))
    packed = quantize_model(model, Recipe((odd, Rule(where=r"layers\..*kernel", weights=Format()))))
    assert [(g.repeat, len(g.blocks)) for g in packed.config.groups] == [(2, 2)]
    bits = formats(packed)
    assert {b for path, b in bits.items() if ".blocks.1." in path} == {4}
    assert {b for path, b in bits.items() if ".blocks.0." in path} == {8}


def test_a_packed_model_generates_and_comes_back_from_a_checkpoint(model, tmp_path):
    packed = quantize_model(model, w4a8())
    sampling = SamplingConfig(max_new_tokens=4, temperature=0.0)
    first = generate(packed, IDS[:, :8], sampling)
    again = generate(dequantize_model(quantize_model(model, w4a16())), IDS[:, :8], sampling)
    assert first.tokens.shape == again.tokens.shape
    create = lambda: create_train_state(
        packed, optax.sgd(0.0), key=jax.random.key(0), trainable="norm"
    )
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, create(), force=True)
    restored = checkpoints.restore(jax.eval_shape(create)).state
    np.testing.assert_array_equal(run(restored.model, IDS), run(packed, IDS))


def test_training_through_a_recipe(model):
    """The latent weights learn, and packing what was trained gives the trained model's logits."""
    recipe = Recipe(
        (Rule(where=r"layers\..*kernel", weights=Format(bits=2, granularity="tensor")),)
    )
    fake = fake_quantize_model(model, recipe)
    batch = {"input_ids": IDS, "labels": IDS}
    optimizer = optax.adam(1e-2)
    state = create_train_state(fake, optimizer, key=jax.random.key(0))
    step = jax.jit(make_train_step(next_token_loss, optimizer))
    losses = []
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(30):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 1
    trained = state.model
    packed = quantize_model(trained, recipe)
    # A weight whose size is just at the threshold may fall to either side, as the mean is summed in another order.
    found, expected = run(packed, IDS), run(trained, IDS)
    assert jnp.linalg.norm(found - expected) < 0.01 * jnp.linalg.norm(expected)


def test_a_module_of_ones_own():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = Dense(8, 16, rngs=rngs)
            self.second = Dense(16, 4, rngs=rngs)

        def __call__(self, x):
            return self.second(self.first(x, "gelu"))

    net = Net(nnx.Rngs(0))
    small = quantize_model(net, Recipe((Rule(where=r"first\.kernel", weights=Format()),)))
    assert isinstance(small.first.kernel.get_value(), PackedWeight)
    assert small(jnp.ones((2, 8))).shape == (2, 4)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("layers.*kernl", Format())], "matches no parameter; did you mean 'kernel'"),
        (
            [(r"layers\.7\..*kernel", Format())],
            "7.*matches no parameter; names are like: embed.*layers.0.attention.query.kernel",
        ),
        (
            [("kernel", Format()), ("query.*kernel", Format(bits=4))],
            "query.*has no weight left: earlier rules match",
        ),
        (
            [("down.*kernel", Format(bits=4, granularity="group", group_size=48))],
            r"layers\.0\.feed_forward\.down\.kernel: .*48 does not divide 128",
        ),
    ],
)
def test_recipes_for_another_model(model, rules, message):
    recipe = Recipe(tuple(Rule(where=where, weights=weights) for where, weights in rules))
    for change in (quantize_model, fake_quantize_model):
        with pytest.raises(ValueError, match=message):
            change(model, recipe)


def test_quantizing_twice_and_over_pairs(model):
    once = quantize_model(model, w8a8())
    with pytest.raises(ValueError, match=r"layers\.0\..*kernel: it is already quantized"):
        quantize_model(once, w4a8())
    with pytest.raises(ValueError, match="has a LoRA pair"):
        quantize_model(add_lora(model, rank=2, key=jax.random.key(0)), w8a8())
    with pytest.raises(
        ValueError, match="activations must be left at its default if weights is None"
    ):
        Rule(where="kernel", weights=None, activations=Format())
    with pytest.raises(ValueError, match="rules must be a tuple whose length is at least 1"):
        Recipe(())
    with pytest.raises(
        ValueError,
        match=r"Rule\('kernel'\): activations: granularity must be token or tensor, got 'channel'",
    ):
        Rule(where="kernel", weights=Format(), activations=Format())
    odd = Recipe(
        (Rule(where=r"down.*kernel", weights=Format(bits=4, granularity="block", num_blocks=5)),)
    )
    for change in (quantize_model, fake_quantize_model):
        with pytest.raises(ValueError, match="5 does not divide 32 outputs"):
            change(model, odd)


def test_low_rank_pairs_over_packed_weights(model):
    """Their gradients are those over the same weights in floats; dequantizing reaches the base of a pair."""
    recipe = Recipe(
        (
            Rule(
                where=r"layers\..*kernel", weights=Format(), activations=Format(granularity="token")
            ),
        )
    )
    pairs = lambda m: add_lora(m, rank=2, key=jax.random.key(1), where=r"(query|down)\.kernel")
    packed = pairs(quantize_model(model, recipe))
    weights_only = Recipe((Rule(where=r"layers\..*kernel", weights=Format()),))
    plain = pairs(dequantize_model(quantize_model(model, weights_only)))
    batch = {"input_ids": IDS, "labels": IDS}

    def gradient(m):
        trained, rest = partition(m, is_adapter)
        loss = lambda trained: next_token_loss(combine(trained, rest), batch, None).mean()
        return jnp.concatenate(
            [x.ravel() for x in jax.tree.leaves(jax.jit(jax.grad(loss))(trained))]
        )

    one, other = gradient(packed), gradient(plain)
    cosine = one @ other / jnp.linalg.norm(one) / jnp.linalg.norm(other)
    assert cosine > 0.99
    bases = jax.tree.leaves(
        dequantize_model(packed), is_leaf=lambda node: isinstance(node, PackedWeight)
    )
    assert not any(isinstance(base, PackedWeight) for base in bases)


def test_bert():
    config = bert(num_layers=2, d_model=32, num_heads=2, d_ff=64, vocab_size=64, max_length=32)
    model = Transformer(config, rngs=nnx.Rngs(0))
    hidden = lambda m: m.encode(IDS).hidden
    found, exact = hidden(quantize_model(model, w8a8())), hidden(model)
    assert 0 < jnp.linalg.norm(found - exact) < 0.03 * jnp.linalg.norm(exact)
