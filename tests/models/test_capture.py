"""What stands at the named points of layers, handed out on request."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effscale.ltd import token_dropping
from effscale.models import Group, by_layer, empty_cache

SCORES = "attention_scores"


@pytest.mark.parametrize("name", ["bert", "llama", "bloom"])
def test_scores_are_products_of_queries_and_keys_by_hand(name, tiny, tokens):
    model = tiny(name)
    ids = tokens(model.config, 2, 8)
    run = jax.jit(lambda m: m.encode(ids, capture=("attention_in", "query", "key", SCORES)))
    found = {n: np.asarray(v) for n, v in run(model).captured[0][0].items()}
    attention = model.groups[0].blocks[0].attention
    for layer in range(2):
        q, k = found["query"][layer], found["key"][layer]
        k = np.repeat(k, q.shape[1] // k.shape[1], 1)
        np.testing.assert_allclose(found[SCORES][layer], q @ k.swapaxes(-1, -2), atol=1e-4)
        if name != "llama":  # which rotates
            part = jax.tree.map(lambda a, i=layer: a[i], attention.query)
            by_hand = np.asarray(part(jnp.asarray(found["attention_in"][layer]))) * attention.scale
            np.testing.assert_allclose(q.swapaxes(1, 2).reshape(2, 8, -1), by_hand, atol=1e-4)


def test_streams_between_layers(tiny, tokens):
    model = tiny("gpt2")
    ids = tokens(model.config, 2, 5)
    encoded = jax.jit(lambda m: m.encode(ids, capture=("layer_in", "layer_out")))(model)
    before, after = (by_layer(encoded.captured, name) for name in ("layer_in", "layer_out"))
    np.testing.assert_array_equal(before[1:], after[:-1])
    np.testing.assert_allclose(model.final_norm(after[-1]), encoded.hidden, atol=1e-5)
    np.testing.assert_allclose(encoded.hidden, model.encode(ids).hidden, atol=1e-5)


def test_ranges_of_all_inputs_of_dense_layers(tiny, tokens):
    """Static calibration: a function of the array leaves the program instead of the array."""
    model = tiny("llama", remat="full")
    ids = tokens(model.config, 2, 5)
    names = ("attention_in", "attention_mixed", "feed_forward_in", "feed_forward_inner")
    ranges = dict.fromkeys(names, lambda x: jnp.stack([x.min(), x.max()]))
    found, whole = (
        jax.jit(lambda m, c=capture: m.encode(ids, capture=c).captured)(model)
        for capture in (ranges, names)
    )
    for name in names:
        arrays = by_layer(whole, name)
        lows, highs = arrays.min((1, 2, 3)), arrays.max((1, 2, 3))
        np.testing.assert_allclose(by_layer(found, name), np.stack([lows, highs], 1), rtol=1e-5)


def test_layers_are_in_the_order_in_which_they_run(tiny, tokens):
    """Pairs of blocks, a second group, a cache, and layers that drop tokens."""
    config = tiny("gpt2").config
    block = config.blocks[0]
    groups = (Group(blocks=(block, block), repeat=2), Group(blocks=(block,), repeat=1))
    model = tiny("gpt2", groups=groups)
    ids = tokens(config, 2, 6)
    first = lambda x: x[:, 0].sum(-1)

    @jax.jit
    def run(model, **given):
        found = model.encode(ids, capture={"layer_in": first, "layer_out": first}, **given).captured
        return by_layer(found, "layer_in"), by_layer(found, "layer_out")

    plain = run(model)
    assert plain[0].shape == (5, 2)
    np.testing.assert_allclose(plain[0][1:], plain[1][:-1], atol=1e-5)
    for a, b in zip(run(model, cache=empty_cache(model.config, 2, 8)), plain, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    dropping = token_dropping(model.config, kept=3, key=jax.random.key(0))
    tokens_of = {"layer_in": lambda x: jnp.int32(x.shape[1])}
    dropped = jax.jit(lambda m: m.encode(ids, run_group=dropping, capture=tokens_of).captured)
    assert by_layer(dropped(model), "layer_in").tolist() == [6, 3, 3, 3, 6]


def test_scores_that_nobody_asked_for_are_not_held_whole(tiny, tokens):
    """Queries of a long causal row go in blocks, each against the keys up to its end."""
    model = tiny("gpt2", positions=None)
    ids = tokens(model.config, 2, 128)
    text = lambda c: jax.jit(lambda m: m.encode(ids, capture=c)).lower(model).as_text()
    assert "x128x128xf32" not in text(())
    assert "x128x128xf32" in text(SCORES)


def test_unknown_points_are_refused_with_the_list(tiny, tokens):
    model = tiny("gpt2")
    ids = tokens(model.config, 1, 4)
    with pytest.raises(
        ValueError, match=r"capture='scores': 'scores' is not a point.*attention_scores"
    ):
        model.encode(ids, capture="scores")
    encoded = model.encode(ids, capture="query")
    with pytest.raises(ValueError, match=r"no layer reports 'key'\. Reported entries: query"):
        by_layer(encoded.captured, "key")
    assert model.encode(ids).captured == ()
