"""Layers taken out and put back, groups split and merged."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effscale.models import (
    Group,
    Transformer,
    abstract_model,
    add_lora,
    gpt2,
    map_weights,
    merge_groups,
    replace_layers,
    split_groups,
    take_layers,
)
from effscale.training import create_train_state, make_train_step, named_leaves, next_token_loss

pytestmark = pytest.mark.exact

run = jax.jit(lambda model, ids: model.encode(ids).hidden)


def repeats(model):
    return [group.repeat for group in model.config.groups]


def deep(tiny, num_layers=6):
    block = tiny("gpt2").config.blocks[0]
    return tiny("gpt2", groups=(Group(blocks=(block,), repeat=num_layers),))


def pairs(tiny):
    """Layers 0 1, 2 3, 4 5 in pairs of unlike blocks, and 6, 7."""
    block = tiny("gpt2").config.blocks[0]
    other = dataclasses.replace(
        block, feed_forward=dataclasses.replace(block.feed_forward, d_ff=20)
    )
    groups = (Group(blocks=(block, other), repeat=3), Group(blocks=(block,), repeat=2))
    return tiny("gpt2", groups=groups)


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def by_hand(model, layers):
    """A stack of the config's own, with the layers' values written into it."""
    new = dataclasses.replace(
        model.config, groups=(Group(blocks=model.config.groups[0].blocks, repeat=len(layers)),)
    )
    built = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract_model(new))
    leaves, structure = jax.tree_util.tree_flatten_with_path(built)
    values = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(model)
    }
    pick = lambda path: (
        np.asarray(values[path])[list(layers)]
        if ".groups" in path or "'groups'" in path
        else values[path]
    )
    return jax.tree.unflatten(structure, [pick(jax.tree_util.keystr(path)) for path, _ in leaves])


@pytest.mark.parametrize("layers", [[0, 2, 5], [1, 2, 3], [4, 1, 1]], ids=str)
def test_taken_layers_are_a_model_of_their_own(layers, tiny, tokens):
    model = deep(tiny)
    before = jax.tree.map(np.array, model)
    taken = take_layers(model, layers)
    assert repeats(taken) == [len(layers)]
    same(taken, by_hand(model, layers))
    ids = tokens(model.config, 2, 5)
    np.testing.assert_array_equal(run(taken, ids), run(by_hand(model, layers), ids))
    same(model, before)


@pytest.mark.parametrize("at", [[2, 3], [0], [1, 2, 3, 4, 5]], ids=str)
def test_a_split_model_computes_the_same(at, tiny, tokens):
    model = deep(tiny)
    split = split_groups(model, at)
    assert repeats(split) == np.diff([0, *[n for n in at if n], 6]).tolist()
    ids = tokens(model.config, 2, 5)
    np.testing.assert_allclose(run(split, ids), run(model, ids), atol=1e-6)
    assert split.config == dataclasses.replace(model.config, groups=split.config.groups)
    same(merge_groups(split), model)


def test_put_back_layers_give_the_same_model(tiny):
    for model, layers in ((deep(tiny), [1, 4]), (pairs(tiny), [2, 3, 5, 6])):
        same(replace_layers(model, layers, take_layers(model, layers)), model)


def test_pairs_stay_pairs_where_they_are_whole(tiny, tokens):
    model = pairs(tiny)
    ids = tokens(model.config, 2, 5)
    kinds = lambda m: [(len(group.blocks), group.repeat) for group in m.config.groups]
    assert kinds(take_layers(model, [0, 1, 4, 5, 7])) == [(2, 2), (1, 1)]
    assert kinds(take_layers(model, [1, 2, 3])) == [(1, 1), (2, 1)]
    split = split_groups(model, [3])
    assert kinds(split) == [(2, 1), (1, 1), (1, 1), (2, 1), (1, 2)]
    np.testing.assert_allclose(run(split, ids), run(model, ids), atol=1e-6)


def test_weights_of_any_kind_and_shapes_alone(tiny, tokens):
    """LoRA pairs are split and merged with their bases; a layer of other weights stands alone."""
    model = deep(tiny)
    adapted = add_lora(model, rank=2, key=jax.random.key(0), where=r"attention\..*kernel")
    same(merge_groups(split_groups(adapted, [2, 3])), adapted)
    low = map_weights(take_layers(model, [2]), lambda w: w.astype(jnp.bfloat16))
    mixed = replace_layers(model, [2], low)
    assert repeats(mixed) == repeats(merge_groups(mixed)) == [2, 1, 3]
    assert bool(jnp.isfinite(run(mixed, tokens(model.config, 2, 5))).all())
    shapes = take_layers(split_groups(abstract_model(model.config), [3]), [0, 3, 5])
    wanted = abstract_model(take_layers(split_groups(model, [3]), [0, 3, 5]).config)
    assert jax.tree.structure(shapes) == jax.tree.structure(wanted)
    assert jax.tree.leaves(shapes) == jax.tree.leaves(wanted)


def test_one_layer_is_trained_alone(tiny):
    """Layer-by-layer distillation: every other number of the model stays bit for bit."""
    config = gpt2(num_layers=3, d_model=16, num_heads=2, vocab_size=23, max_length=8)
    whole = tiny(config)
    split = split_groups(whole, [1, 2])
    optimizer, only = optax.sgd(1.0), r"^groups\.1\."
    step = jax.jit(make_train_step(next_token_loss, optimizer, trainable=only))
    state = create_train_state(split, optimizer, key=jax.random.key(0), trainable=only)
    ids = jnp.arange(16).reshape(2, 8) % 23
    for _ in range(2):
        state, _ = step(state, {"input_ids": ids, "labels": ids + 1})
    trained = merge_groups(state.model)
    changed = set()
    for old, new in zip(named_leaves(whole), named_leaves(trained), strict=True):
        if re.search(r"^groups\.0\.", old.name):
            changed |= set(
                np.argwhere((np.asarray(old.leaf) != new.leaf).reshape(3, -1).any(1))[:, 0]
            )
        else:
            np.testing.assert_array_equal(old.leaf, new.leaf)
    assert changed == {1}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: take_layers(m, [6]), r"layers must be between 0 and 5, got \[6\], which names \[6\]"),
        (lambda m: take_layers(m, []), r"layers must name at least one layer, got \[\]"),
        (lambda m: split_groups(m, [9]), r"at must be between 0 and 5, got \[9\]"),
        (lambda m: replace_layers(m, [1, 1], take_layers(m, [0, 1])), r"layers must be distinct, got"),
        (lambda m: replace_layers(m, [1], take_layers(m, [0, 1])), r"one entry for each of the 2 layers of source, got"),
        (
            lambda m: replace_layers(m, [1], abstract_model(gpt2(num_layers=1, d_model=8, num_heads=1, vocab_size=9))),
            r"source must have the model's d_model=24, got 8",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(call, message, tiny):
    model: Transformer = abstract_model(deep(tiny).config)
    with pytest.raises(ValueError, match=message):
        call(model)
