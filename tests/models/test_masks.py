"""Padding, packing and positions of whole models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effscale.models import empty_cache

SEQ = 9


@jax.jit
def hidden(model, ids, **arrays):
    return model.encode(ids, **arrays).hidden


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(
    "name", ["gpt2", "opt-350m", "bloom", "bloom-odd", "gptj", "neox", "llama", "qwen", "bert"]
)
def test_padding_changes_nothing(name, tiny, tokens):
    """The same six tokens among any amount of padding on either side."""
    model = tiny(name)
    ids = tokens(model.config, 1, 6)
    bare = hidden(model, ids)
    rows, masks = [], []
    for left in range(SEQ - 6 + 1):
        row, mask = np.full(SEQ, 11, np.int32), np.zeros(SEQ, np.int32)
        row[left : left + 6], mask[left : left + 6] = ids[0], 1
        rows.append(row)
        masks.append(mask)
    mask = np.stack(masks)
    out = hidden(model, jnp.asarray(np.stack(rows)), attention_mask=jnp.asarray(mask))
    for row in range(len(rows)):
        close(np.asarray(out)[row][mask[row] == 1], bare[0])
    assert np.isfinite(np.asarray(out)).all()


@pytest.mark.parametrize("name", ["gpt2", "opt-350m", "bloom-odd", "gptj", "neox", "qwen", "bert"])
@pytest.mark.parametrize("explicit", [True, False], ids=["positions given", "positions derived"])
def test_packed_segments_are_separate_rows(name, explicit, tiny, tokens):
    model = tiny(name)
    ids = tokens(model.config, 2, SEQ)
    lengths = [(4, 5), (2, 6)]  # the second row ends in padding, segment 0
    segments = np.zeros((2, SEQ), np.int32)
    positions = np.zeros((2, SEQ), np.int32)
    for row, (a, b) in enumerate(lengths):
        segments[row, :a], segments[row, a : a + b] = 1, 2
        positions[row, :a], positions[row, a : a + b] = np.arange(a), np.arange(b)
    given = {"positions": jnp.asarray(positions)} if explicit else {}
    packed = hidden(model, ids, segment_ids=jnp.asarray(segments), **given)

    apart, mask = np.zeros((4, 6), np.int32), np.zeros((4, 6), np.int32)
    for row, (a, b) in enumerate(lengths):
        apart[2 * row, :a], mask[2 * row, :a] = ids[row, :a], 1
        apart[2 * row + 1, :b], mask[2 * row + 1, :b] = ids[row, a : a + b], 1
    alone = hidden(model, jnp.asarray(apart), attention_mask=jnp.asarray(mask))
    for row, (a, b) in enumerate(lengths):
        close(packed[row, :a], alone[2 * row, :a])
        close(packed[row, a : a + b], alone[2 * row + 1, :b])


def test_a_causal_model_sees_no_later_token(causal_family, tiny, tokens):
    model = tiny(causal_family)
    ids = tokens(model.config, 2, SEQ)
    changed = ids.at[:, 5].set((ids[:, 5] + 1) % 37)
    before, after = hidden(model, ids), hidden(model, changed)
    close(before[:, :5], after[:, :5])
    assert (jnp.abs(before - after)[:, 5:].max((0, 2)) > 1e-4).all()


def test_an_encoder_sees_all_tokens(tiny, tokens):
    model = tiny("bert")
    ids = tokens(model.config, 2, SEQ)
    changed = ids.at[:, 5].set((ids[:, 5] + 1) % 37)
    assert (jnp.abs(hidden(model, ids) - hidden(model, changed)).max((0, 2)) > 1e-4).all()


@pytest.mark.parametrize("name", ["bloom", "gptj", "neox", "llama"])
def test_relative_positions_do_not_mind_a_shift(name, tiny, tokens):
    model = tiny(name)
    ids = tokens(model.config, 2, SEQ)
    shifted = hidden(model, ids, positions=jnp.arange(SEQ)[None] + jnp.array([[3], [40]]))
    np.testing.assert_allclose(shifted, hidden(model, ids), atol=1e-3)


def test_explicit_positions_choose_rows_of_the_table(tiny, tokens):
    for name, offset in (("gpt2", 0), ("opt", 2)):
        model = tiny(name)
        ids = tokens(model.config, 2, 4)
        positions = jnp.array([[5, 0, 7, 2]])
        table = model.embed.positions.embedding
        table[...] = table[...].at[offset : offset + 4].set(table[...][positions[0] + offset])
        default = hidden(model, ids)
        explicit = hidden(tiny(name), ids, positions=positions)
        close(default, explicit)


@pytest.mark.parametrize("name", ["gpt2", "bloom-odd", "llama"])
def test_long_sequences_take_the_same_values_in_blocks(name, tiny, tokens):
    """A long causal sequence is attended in blocks; against a cache it is not."""
    model = (
        tiny(name, positions=tiny(name).config.positions)
        if name != "gpt2"
        else tiny("llama", positions=None)
    )
    seq = 128
    ids = tokens(model.config, 2, seq)
    mask = jnp.ones((2, seq), jnp.int32).at[0, :37].set(0).at[1, 100:].set(0)

    @jax.jit
    def whole(model, ids, mask=None):
        cache = empty_cache(model.config, 2, seq)
        return model.encode(ids, attention_mask=mask, cache=cache).hidden

    real = np.asarray(mask) == 1
    close(hidden(model, ids), whole(model, ids))
    close(
        np.asarray(hidden(model, ids, attention_mask=mask))[real],
        np.asarray(whole(model, ids, mask))[real],
    )


def test_long_packed_sequences_in_blocks(tiny, tokens):
    model = tiny("llama")
    ids = tokens(model.config, 1, 256)
    lengths = [100, 30, 126]
    segments = np.repeat([1, 2, 3], lengths).astype(np.int32)[None]
    positions = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)[None]
    packed = hidden(model, ids, segment_ids=jnp.asarray(segments), positions=jnp.asarray(positions))
    apart, mask = np.zeros((3, 126), np.int32), np.zeros((3, 126), np.int32)
    for row in range(3):
        piece = np.asarray(ids)[segments == row + 1]
        apart[row, : len(piece)], mask[row, : len(piece)] = piece, 1
    alone = hidden(model, jnp.asarray(apart), attention_mask=jnp.asarray(mask))
    np.testing.assert_allclose(packed[0], np.asarray(alone)[mask == 1], atol=5e-5)
