"""Dropout: a key turns it on, and every place has its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effscale.models import (
    AttentionConfig,
    BlockConfig,
    ClassHead,
    Group,
    MLPConfig,
    TokenInputs,
    TransformerConfig,
    bert,
    gpt2,
    vit,
)

RATE = 0.3
run = jax.jit(lambda model, ids, key=None: model.encode(ids, key=key).hidden)


def with_dropout(place):
    rate = lambda name: RATE if place in (name, "everywhere") else 0.0
    block = BlockConfig(
        attention=AttentionConfig(num_heads=4, dropout=rate("attention")),
        feed_forward=MLPConfig(d_ff=20),
        dropout=rate("block"),
    )
    return TransformerConfig(
        d_model=24,
        groups=(Group(blocks=(block,), repeat=2),),
        inputs=TokenInputs(vocab_size=37, dropout=rate("inputs")),
        positions=None,
    )


@pytest.mark.parametrize("place", ["attention", "block", "inputs", "everywhere"])
def test_a_key_turns_it_on(place, tiny, tokens):
    model = tiny(with_dropout(place))
    ids = tokens(model.config)
    still = run(model, ids)
    one, two = (run(model, ids, jax.random.key(seed)) for seed in (0, 1))
    np.testing.assert_array_equal(run(model, ids), still)
    np.testing.assert_array_equal(run(model, ids, jax.random.key(0)), one)
    for a, b in ((still, one), (one, two)):
        assert (jnp.abs(a - b).max(-1) > 0).mean() > 0.9
    if place == "everywhere":
        plain = tiny(with_dropout("nowhere"))
        np.testing.assert_allclose(run(plain, ids), still, atol=1e-6)
        np.testing.assert_allclose(run(plain, ids, jax.random.key(0)), still, atol=1e-6)


def test_families_take_a_rate(tiny, tokens):
    model = tiny(
        gpt2(num_layers=2, d_model=24, num_heads=4, vocab_size=37, max_length=24, dropout=RATE)
    )
    ids = tokens(model.config)
    assert float(jnp.abs(run(model, ids) - run(model, ids, jax.random.key(0))).max()) > 0.01
    images = jnp.ones((2, 8, 8, 3))
    model = tiny(
        vit(num_layers=2, d_model=24, num_heads=4, image_size=8, patch_size=4, dropout=RATE)
    )
    assert float(jnp.abs(run(model, images) - run(model, images, jax.random.key(0))).max()) > 0.01


def classify(pool):
    size = {"num_layers": 1, "d_model": 24, "num_heads": 4, "vocab_size": 37, "max_length": 24}
    head = lambda name, rate: ClassHead(num_classes=5, name=name, pool=pool, dropout=rate)
    heads = (head("still", 0.0), head("one", RATE), head("two", RATE))
    return bert(**size, heads=heads)


call = jax.jit(lambda model, ids, key=None: model(ids, key=key))


@pytest.mark.parametrize("pool", ["pooled", "mean", "none"])
def test_a_classifiers_dropout(pool, tiny, tokens):
    """It falls on the vector that the classifier reads, by a key of each head's own."""
    model = tiny(classify(pool))
    for name in ("still", "one", "two"):  # a sum of the features, so that heads may be compared
        model.heads[name].dense.kernel[...] = jnp.ones((24, 5))
        model.heads[name].dense.bias[...] = jnp.zeros(5)
    ids = tokens(model.config)
    without, out = call(model, ids), call(model, ids, jax.random.key(0))
    for name in ("still", "one", "two"):
        np.testing.assert_array_equal(without[name], without["still"])
    np.testing.assert_allclose(out["still"], without["still"], atol=1e-5)
    for a, b in (("still", "one"), ("still", "two"), ("one", "two")):
        assert (jnp.abs(out[a] - out[b]) > 1e-3).all()
    np.testing.assert_array_equal(call(model, ids, jax.random.key(0))["one"], out["one"])
    assert (jnp.abs(call(model, ids, jax.random.key(1))["one"] - out["one"]) > 1e-3).all()
    # The features that are kept: some subset of the vector's, scaled up.
    vectors = {"pooled": out["pooled"], "mean": out["hidden"].mean(1), "none": out["hidden"]}[pool]
    model.heads["one"].dense.kernel[...] = jnp.eye(24)[:, :5]
    kept = call(model, ids, jax.random.key(0))["one"] * (1 - RATE) / vectors[..., :5]
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-4)
    assert set(np.unique(np.round(kept))) == {0.0, 1.0}


def test_a_classifiers_key_is_none_of_the_layers(tiny, tokens):
    """What is dropped before the classifier is unlike what is dropped anywhere else, the embedding included."""
    model = tiny(classify("none"))
    ids = tokens(model.config, 4, 12)
    key = jax.random.key(0)
    model.heads["one"].dense.kernel[...] = jnp.eye(24)[:, :5]
    model.heads["one"].dense.bias[...] = jnp.zeros(5)
    hidden = model.encode(ids).hidden
    kept = np.asarray(model.outputs(hidden, key=key)["one"] != 0)
    np.testing.assert_array_equal(kept, model.outputs(hidden, None, key)["one"] != 0)
    places = [jax.random.fold_in(key, i) for i in range(2)] + list(jax.random.split(key, 2))
    for place in places:
        other = np.asarray(jax.random.bernoulli(place, 1 - RATE, (4, 12, 24)))[..., :5]
        assert (kept != other).any()
    assert 0.6 < kept.mean() < 0.8


@pytest.mark.parametrize("pair", [False, True])
def test_layers_drop_different_features(pair, tiny, tokens):
    """Layers that only add a constant: what is dropped shows in the sums, and identical masks would show as doubles."""
    config = with_dropout("block")
    block = config.blocks[0]
    group = Group(blocks=(block, block), repeat=1) if pair else Group(blocks=(block,), repeat=2)
    config = dataclasses.replace(config, groups=(group,), final_norm=None)
    zero = jax.tree.map(jnp.zeros_like, tiny(config))
    layers = iter((1.0, 10.0))
    for stacked in zero.groups[0].blocks:
        sizes = jnp.array([next(layers) for _ in range(group.repeat)])[:, None] * jnp.ones((1, 24))
        stacked.attention.out.bias[...] = sizes
        stacked.feed_forward.down.bias[...] = 100 * sizes
    ids = tokens(config, 4, 12)
    out = run(zero, ids, jax.random.key(3)) * (
        1 - RATE
    )  # each digit: whether that part of that layer was kept
    digits = (np.round(np.asarray(out)).astype(int)[..., None] // np.array([1, 10, 100, 1000])) % 10
    assert set(np.unique(digits)) == {0, 1}
    flat = digits.reshape(-1, 4)
    np.testing.assert_allclose(flat.mean(0), 1 - RATE, atol=0.05)  # 1152 draws each
    correlation = np.corrcoef(flat.T)
    assert np.abs(correlation - np.eye(4)).max() < 0.15


def test_the_mean_over_keys_is_near_the_output_without(tiny, tokens):
    """For the embedding's dropout with nothing nonlinear after it."""
    config = dataclasses.replace(with_dropout("inputs"), final_norm=None)
    model = jax.tree.map(jnp.zeros_like, tiny(config))
    model.embed.tokens.embedding[...] = jnp.ones((37, 24))
    ids = tokens(config)
    # The model is an argument: closed over, its zeros are folded by XLA's CPU compiler, now and then to NaN.
    keys = jax.random.split(jax.random.key(0), 500)
    over_keys = jax.vmap(lambda model, key: run(model, ids, key), in_axes=(None, 0))
    mean = jax.jit(over_keys)(model, keys).mean(0)
    np.testing.assert_allclose(mean, run(model, ids), atol=0.15)
