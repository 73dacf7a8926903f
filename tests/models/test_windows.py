"""Layers whose tokens see a window of tokens before them, and groups of layers that differ in it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effscale.models import AttentionConfig, bert, llama
from effscale.models.attention import in_blocks
from effscale.models.context import build_context
from effscale.models.grouping import group_layers
from kernels_pallas.dispatch import Unsupported

SIZES = {"num_layers": 2, "d_model": 16, "num_heads": 2, "d_ff": 24, "vocab_size": 31}


def slowly(query, keys, values, window):
    """Token by token, over the keys that it may see."""
    out = np.zeros_like(query)
    for b, h, i in np.ndindex(query.shape[:3]):
        first = max(0, i - window + 1)
        scores = keys[b, h, first : i + 1] @ query[b, h, i]
        weights = np.exp(scores - scores.max())
        out[b, h, i] = weights / weights.sum() @ values[b, h, first : i + 1]
    return out


@pytest.mark.parametrize("seq", [9, 128])  # in one block, and in four
@pytest.mark.parametrize("window", [1, 3, 50, 200])
def test_a_token_sees_its_window(seq, window):
    random = np.random.default_rng(0)
    query, keys, values = (random.normal(size=(2, 2, seq, 4)).astype(np.float32) for _ in range(3))
    context = build_context(seq, kind=None, head_dim=4, causal=True)
    found = jax.jit(lambda *a: in_blocks(*a, context, window=window))(query, keys, values)
    np.testing.assert_allclose(found, slowly(query, keys, values, window), atol=1e-5)


def test_a_window_wider_than_the_text_cuts_nothing(tiny, tokens):
    wide = tiny(llama(**SIZES, window=9))
    run = jax.jit(lambda model, ids: model(ids))
    found = run(wide, tokens(wide.config))
    np.testing.assert_array_equal(found, run(tiny(llama(**SIZES)), tokens(wide.config)))


def test_kernels_have_no_windows(tiny, tokens):
    model = tiny(llama(**SIZES, window=4), attention_implementation="splash")
    with pytest.raises(Unsupported, match="the layer's window is 4"):
        model(tokens(model.config))
    model = tiny(llama(**SIZES, window=4))
    lowered = jax.jit(lambda m, x: m(x)).trace(model, jnp.zeros((1, 128), jnp.int32))
    assert "custom_call" not in lowered.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: AttentionConfig(num_heads=2, window=0),
            "AttentionConfig.window must be at.*, got 0",
        ),
        (
            lambda: llama(**SIZES, window=(3,)),
            "window must have one entry for each of the 2 layers, got 1",
        ),
        (
            lambda: dataclasses.replace(llama(**SIZES, window=3), causal=False),
            "causal must be True with a window.*, got False",
        ),
    ],
)
def test_what_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


KINDS = [*llama(**SIZES | {"num_layers": 3}, window=(1, 2, 3)).layers]


@given(kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=20))
def test_groups_are_the_layers_in_their_order(kinds):
    groups = group_layers(kinds)
    assert [b for group in groups for b in group.blocks * group.repeat] == kinds


@pytest.mark.parametrize(
    ("order", "wanted"),
    [
        ("aaaaaa", [("a", 6)]),
        ("abababab", [("ab", 4)]),
        ("abbbbb", [("a", 1), ("b", 5)]),
        ("aaabaaab", [("aaab", 2)]),
        ("aabcbcbc", [("a", 2), ("bc", 3)]),
    ],
)
def test_layers_that_take_turns_are_one_group(order, wanted):
    of = dict(zip("abc", KINDS, strict=True))
    names = {kind: name for name, kind in of.items()}
    groups = group_layers([of[name] for name in order])
    assert [("".join(names[b] for b in g.blocks), g.repeat) for g in groups] == wanted


def test_a_config_tells_its_layers():
    config = llama(**SIZES | {"num_layers": 5}, window=(None, 2, None, 2, None))
    assert [layer.attention.window for layer in config.layers] == [None, 2, None, 2, None]
    assert [(len(group.blocks), group.repeat) for group in config.groups] == [(2, 2), (1, 1)]
    assert len(bert(num_layers=3, d_model=16, num_heads=2).layers) == 3
