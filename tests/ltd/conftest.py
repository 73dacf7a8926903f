"""Tiny models of four layers, and token dropping written as loops over layers and rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effscale.ltd import sample_kept
from effscale.ltd.layers import dropping_layers
from effscale.models import (
    abstract_model,
    bert,
    bert_pretraining_heads,
    bloom,
    build_context,
    gpt2,
    gptj,
    llama,
    vit,
)

SIZE = {"num_layers": 4, "d_model": 16, "num_heads": 2}
TEXT = SIZE | {"vocab_size": 37}
TINY = {
    "gpt2": gpt2(**TEXT, max_length=24),
    "bloom": bloom(**TEXT),
    "gptj": gptj(**TEXT, rotary_dim=4),
    "llama": llama(**TEXT, num_kv_heads=1, d_ff=20),
    "bert": bert(**TEXT, max_length=24, heads=bert_pretraining_heads()),
    "vit": vit(**SIZE, image_size=12, patch_size=4, num_classes=5),
}


def build(config, **changes):
    """A model with noise in every parameter."""
    config = dataclasses.replace(TINY[config] if isinstance(config, str) else config, **changes)
    random = np.random.default_rng(7)

    def value(path, leaf):
        noise = random.normal(0, 0.3, leaf.shape).astype(np.float32)
        return jnp.asarray(noise + (path[-2].name == "scale"))

    return jax.tree_util.tree_map_with_path(value, abstract_model(config))


def text(batch, seq, seed=1):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 37, (batch, seq)), jnp.int32)


def by_loops(model, inputs, *, kept, key, layers=None, dropout_key=None, **given):
    """Hidden states: every dropping layer run on one row at a time, on the tokens of that row that it keeps."""
    config = model.config
    chosen = dropping_layers(config, layers)
    batch, seq = len(inputs), model._length(inputs)
    mask, segments = given.get("attention_mask"), given.get("segment_ids")
    positions = np.broadcast_to(np.arange(seq), (batch, seq))
    if segments is not None:  # each token's distance to the first of its own segment
        positions = np.array(
            [[i - list(row).index(s) for i, s in enumerate(row)] for row in np.asarray(segments)]
        )
    elif mask is not None:
        positions = np.maximum(np.cumsum(np.asarray(mask), 1) - 1, 0)

    def context(rows, tokens):
        cut = lambda a: None if a is None else jnp.asarray(a)[rows][:, tokens]
        return build_context(
            len(tokens),
            kind=config.positions,
            head_dim=config.groups[0].blocks[0].attention.width(config.d_model),
            causal=config.causal,
            valid=cut(None if mask is None else jnp.asarray(mask, bool)),
            positions=cut(jnp.asarray(positions, jnp.int32)),
            segments=cut(segments),
        )

    keys = None if dropout_key is None else jax.random.split(dropout_key, 1 + len(model.groups))
    of = lambda i: None if keys is None else keys[i]
    x = model.embed(inputs, jnp.asarray(positions, jnp.int32), given.get("type_ids"), of(0))
    number = 0
    for g, group in enumerate(model.groups):
        for repetition in range(group.repeat):
            for i, stacked in enumerate(group.blocks):
                block = jax.tree.map(lambda a, n=repetition: a[n], stacked)
                block_key = None
                if keys is not None:
                    layer_key = jax.random.split(keys[1 + g], group.repeat)[repetition]
                    block_key = jax.random.fold_in(layer_key, i)
                if number in chosen and kept < seq:
                    for row, at in enumerate(sample_kept(key, (number,), batch, seq, kept)[0]):
                        alone = context(slice(row, row + 1), at)
                        y, _, _ = block(x[row : row + 1, at], alone, None, block_key)
                        x = x.at[row, at].set(y[0])
                else:
                    x, _, _ = block(x, context(slice(None), np.arange(seq)), None, block_key)
                number += 1
    return x if model.final_norm is None else model.final_norm(x)


@pytest.fixture
def tiny():
    """From a name (or config) and changes of its fields to a model with random parameters."""
    return build


@pytest.fixture
def tokens():
    """Random ids of a shape."""
    return text


@pytest.fixture
def loops():
    """The slow version."""
    return by_loops
