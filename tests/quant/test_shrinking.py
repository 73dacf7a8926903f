"""Models made smaller by what their masks leave out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effscale.interop import load_pretrained, save_pretrained
from effscale.models import (
    Transformer,
    abstract_model,
    add_lora,
    bert,
    bloom,
    empty_cache,
    gpt2,
    llama,
)
from effscale.quant import (
    Format,
    PruneRule,
    Pruning,
    Recipe,
    Rule,
    fake_quantize_model,
    prune_model,
    quantize_model,
    shrink_model,
)
from effscale.training import named_leaves

SIZES = {"num_layers": 2, "d_model": 16, "num_heads": 4, "d_ff": 24, "vocab_size": 32}
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 8)), jnp.int32)
BERT = bert(**SIZES, max_length=8)
LLAMA = llama(**SIZES, num_kv_heads=2)


@jax.jit
def run(model, ids):
    return model.encode(ids).hidden


@functools.cache
def noisy(config):
    """A model whose biases are not zero."""
    leaves, structure = jax.tree.flatten(Transformer(config, rngs=nnx.Rngs(0)))
    noise = [0.2 * jax.random.normal(jax.random.key(i), a.shape) for i, a in enumerate(leaves)]
    return jax.tree.unflatten(structure, [a + b for a, b in zip(leaves, noise, strict=True)])


def rows(ratio, where=r"feed_forward\.up\.kernel", **options):
    return PruneRule(where=where, pruning=Pruning(structure="row", dense_ratio=ratio, **options))


def heads(ratio, where=r"attention\.out\.kernel"):
    return PruneRule(where=where, pruning=Pruning(structure="head", dense_ratio=ratio))


@pytest.fixture(scope="module")
def small_bert():
    pruned = prune_model(noisy(BERT), (rows(0.3), heads(0.5)))
    return pruned, shrink_model(pruned)


def test_rows_and_heads_are_taken_out(small_bert):
    pruned, small = small_bert
    (group,) = small.config.groups
    assert group.blocks[0].feed_forward.d_ff == 8
    assert group.blocks[0].attention.num_heads == 2
    assert group.blocks[0].attention.width(16) == 4
    # It has the arrays of a model that is made from its config.
    shapes = lambda model: [(leaf.name, leaf.leaf.shape) for leaf in named_leaves(model)]
    assert shapes(small) == shapes(abstract_model(small.config))
    np.testing.assert_allclose(run(small, IDS), run(pruned, IDS), atol=1e-5)


def test_what_transformers_cannot_say_is_not_saved(small_bert, tmp_path):
    """BERT's width of a head is that of the model over their number; its inner width is free."""
    _, small = small_bert
    with pytest.raises(ValueError, match=r"layers\.attention\.head_dim is 4, and bert has 8"):
        save_pretrained(small, tmp_path / "heads")
    by_rows = shrink_model(prune_model(noisy(BERT), (rows(0.3),)))
    save_pretrained(by_rows, tmp_path / "rows")
    loaded = load_pretrained(tmp_path / "rows")
    assert loaded.config.blocks[0].feed_forward.d_ff == 8
    jax.tree.map(np.testing.assert_array_equal, loaded.groups, by_rows.groups)


def test_a_llama_loses_heads_and_is_saved(tmp_path):
    """Of grouped heads whole groups go, or as many of each; decoding knows the smaller cache."""
    model = noisy(LLAMA)
    # Of the first layer the queries of the second key head are large; of the second layer, one of each.
    out = model.groups[0].blocks[0].attention.out
    large = jnp.array([[0, 0, 9, 9], [9, 0, 0, 9]], jnp.float32).repeat(4, 1)[:, :, None]
    out.kernel = out.kernel.replace(out.kernel.get_value() * (1 + large))
    pruned = prune_model(model, (heads(0.5), rows(0.5)))
    small = shrink_model(pruned)
    attention = [block.attention for block in small.config.blocks]
    assert [(a.num_heads, a.kv_heads, a.width(16)) for a in attention] == [(2, 1, 4), (2, 2, 4)]
    expected = run(pruned, IDS)
    np.testing.assert_allclose(run(small, IDS), expected, atol=1e-5)
    decode = jax.jit(lambda model, ids, cache: model.encode(ids, cache=cache).hidden)
    decoded = decode(small, IDS, empty_cache(small.config, 2, 8))
    np.testing.assert_allclose(decoded, expected, atol=1e-5)
    with pytest.raises(ValueError, match="transformers has no family"):
        save_pretrained(small, tmp_path / "unlike")
    alike = shrink_model(prune_model(noisy(llama(**SIZES)), (heads(0.5), rows(0.5))))
    save_pretrained(alike, tmp_path / "alike")
    loaded = load_pretrained(tmp_path / "alike")
    assert loaded.config.blocks[0].attention.num_heads == 2
    same = zip(named_leaves(loaded), named_leaves(alike), strict=True)
    assert all(a.name == b.name and jnp.array_equal(a.leaf, b.leaf) for a, b in same)


def test_layers_that_keep_different_numbers_become_groups():
    """By rules for some layers, or where up and gate are pruned apart and what both keep differs."""
    config = dataclasses.replace(BERT, groups=(dataclasses.replace(BERT.groups[0], repeat=3),))
    pruned = prune_model(noisy(config), (rows(0.5, r"layers\.1\..*up"), rows(0.25)))
    small = shrink_model(pruned)
    sizes = [(g.repeat, g.blocks[0].feed_forward.d_ff) for g in small.config.groups]
    assert sizes == [(1, 6), (1, 12), (1, 6)]
    both = prune_model(noisy(LLAMA), (rows(0.5, "up|gate"),))
    small = shrink_model(both)
    sizes = [group.blocks[0].feed_forward.d_ff for group in small.config.groups]
    assert len(set(sizes)) == 2, "pick noise with which the two layers differ"
    assert max(sizes) < 12
    np.testing.assert_allclose(run(small, IDS), run(both, IDS), atol=1e-5)


def test_a_pair_of_blocks_and_other_masks():
    """A stack of pairs in which one of each is pruned stays one; masks of other kinds become zeros."""
    config = gpt2(**SIZES, max_length=8)
    block = config.groups[0].blocks[0]
    group = dataclasses.replace(config.groups[0], blocks=(block, block), repeat=2)
    model = noisy(dataclasses.replace(config, groups=(group,)))
    sparse = PruneRule(where=r"(query|down)\.kernel", pruning=Pruning(dense_ratio=0.5))
    pruned = prune_model(model, (rows(0.5, r"layers\.[13]\..*up"), sparse))
    small = shrink_model(pruned)
    assert [[b.feed_forward.d_ff for b in g.blocks] for g in small.config.groups] == [[24, 12]]
    query = small.groups[0].blocks[0].attention.query.kernel.get_value()
    assert isinstance(query, jax.Array)
    assert (query == 0).sum() == 2 * 128
    np.testing.assert_allclose(run(small, IDS), run(pruned, IDS), atol=1e-5)


def test_rounded_weights_stay_rounded():
    """Scales of outputs are what they were; groups of inputs must still divide what is left of these."""
    recipe = Recipe((Rule(where=r"feed_forward\.up\.kernel", weights=Format(bits=4)),))
    pruned = prune_model(fake_quantize_model(noisy(BERT), recipe), (rows(0.5),))
    small = shrink_model(pruned)
    values = lambda model: model.groups[0].blocks[0].feed_forward.up.kernel.get_value().dense()
    for kept, all_of_them in zip(values(small), values(pruned), strict=True):
        np.testing.assert_array_equal(kept, all_of_them[:, (all_of_them != 0).any(0)])
    packed = quantize_model(small, recipe)
    assert packed.groups[0].blocks[0].feed_forward.up.kernel.get_value().shape == (2, 16, 12)
    groups = Format(bits=4, granularity="group", group_size=8)
    recipe = Recipe((Rule(where=r"feed_forward\.down\.kernel", weights=groups),))
    pruned = prune_model(fake_quantize_model(noisy(BERT), recipe), (rows(0.5),))
    with pytest.raises(
        ValueError, match=r"layers\.0\.feed_forward\.down\.kernel, after shrinking: .*8"
    ):
        shrink_model(pruned)


def test_what_cannot_be_shrunk():
    model = noisy(BERT)
    with pytest.raises(ValueError, match="nothing can be removed"):
        shrink_model(model)
    with pytest.raises(ValueError, match="nothing can be removed"):
        shrink_model(prune_model(model, (rows(0.5, "down"),)))
    late = prune_model(model, (rows(0.5, offset=7),))
    with pytest.raises(
        ValueError, match=r"layers\.0\.feed_forward\.up\.kernel: at step 0 it is not pruned"
    ):
        shrink_model(late)
    sigmoid = noisy(bert(**SIZES, max_length=8, activation="sigmoid"))
    with pytest.raises(ValueError, match=r"layers\.0\.feed_forward: sigmoid of zero is 0\.5"):
        shrink_model(prune_model(sigmoid, (rows(0.5),)))
    alibi = bloom(**{name: size for name, size in SIZES.items() if name != "d_ff"})
    with pytest.raises(ValueError, match=r"layers\.0\.attention: ALiBi's slopes"):
        shrink_model(prune_model(noisy(alibi), (heads(0.5),)))
    normed = noisy(llama(**SIZES, qk_norm="all"))
    with pytest.raises(ValueError, match=r"layers\.0\.attention: queries and keys are normalized"):
        shrink_model(prune_model(normed, (heads(0.5),)))
    with pytest.raises(ValueError, match=r"the same number of query heads, got \[\d, \d\]"):
        shrink_model(prune_model(noisy(LLAMA), (heads(0.75),)))
    adapted = add_lora(
        prune_model(model, (heads(0.5),)), rank=2, key=jax.random.key(0), where="query"
    )
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.query\.kernel is a LoRA"):
        shrink_model(adapted)
