"""Keys and values of earlier tokens: any way of feeding a sequence gives what the whole one gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effscale.models import YarnScaling, empty_cache, gpt2, llama, unroll
from effscale.models.cache import grow_cache

SEQ = 11


@jax.jit
def step(model, ids, cache, mask=None, positions=None):
    encoded = model.encode(ids, attention_mask=mask, positions=positions, cache=cache)
    return encoded.hidden, encoded.cache


whole = jax.jit(lambda model, ids, **arrays: model.encode(ids, **arrays).hidden)


def in_pieces(model, ids, mask, sizes, slots=SEQ + 2):
    cache = empty_cache(model.config, ids.shape[0], slots)
    outputs, at = [], 0
    for size in sizes:
        piece = slice(at, at + size)
        out, cache = step(model, ids[:, piece], cache, None if mask is None else mask[:, piece])
        outputs.append(out)
        at += size
    assert int(cache.length) == at == ids.shape[1]
    return jnp.concatenate(outputs, 1), cache


def test_pieces_equal_the_whole(decoder, tiny, tokens):
    model = tiny(decoder)
    ids = tokens(model.config, 3, SEQ)
    # The last row's padding outlasts the first piece.
    mask = jnp.arange(SEQ)[None] >= jnp.array([[0], [3], [6]])
    full = np.asarray(whole(model, ids, attention_mask=mask))
    found, cache = in_pieces(model, ids, mask, (5, 1, 1, 1, 3))
    real = np.asarray(mask)
    np.testing.assert_allclose(np.asarray(found)[real], full[real], atol=1e-5)
    np.testing.assert_array_equal(cache.valid[:, :SEQ], real)
    assert not cache.valid[:, SEQ:].any()
    np.testing.assert_array_equal(np.asarray(cache.positions[:, SEQ - 1]), real.sum(1) - 1)


@pytest.mark.parametrize("name", ["gpt2", "bloom-odd", "llama"])
def test_an_unrolled_model_is_the_same(name, tiny, tokens):
    model = tiny(name)
    flat = unroll(model)
    ids = tokens(model.config, 2, 8)
    np.testing.assert_allclose(whole(flat, ids), whole(model, ids), atol=1e-6)
    found, _ = in_pieces(flat, ids, None, (5, 1, 2))
    np.testing.assert_allclose(found, whole(model, ids), atol=1e-5)
    assert [group.repeat for group in flat.config.groups] == [1, 1]
    assert model.config.groups[0].repeat == 2  # the given one stays as it was
    assert len(model.groups) == 1


def test_unlike_layers_in_pieces(tiny, tokens):
    model = tiny(gpt2(num_layers=3, d_model=24, num_heads=4, vocab_size=37, max_length=24, scale_by_layer=True))  # fmt: skip
    ids = tokens(model.config, 2, 8)
    found, _ = in_pieces(model, ids, None, (5, 1, 2))
    np.testing.assert_allclose(found, whole(model, ids), atol=1e-5)
    np.testing.assert_allclose(whole(unroll(model), ids), whole(model, ids), atol=1e-6)


def test_scaled_rotary_in_pieces(tiny, tokens):
    scaling = YarnScaling(factor=4.0, original_max_length=8)
    model = tiny(llama(num_layers=2, d_model=24, num_heads=4, d_ff=40, vocab_size=37, rotary_scaling=scaling))  # fmt: skip
    ids = tokens(model.config, 2, 8)
    found, _ = in_pieces(model, ids, None, (5, 1, 2))
    np.testing.assert_allclose(found, whole(model, ids), atol=1e-5)


def test_one_row_of_explicit_positions_serves_the_batch(tiny, tokens):
    model = tiny("bloom")
    ids = tokens(model.config, 3, 6)
    cache = empty_cache(model.config, 3, 6)
    _, cache = step(model, ids[:, :4], cache, positions=jnp.arange(4)[None])
    out, cache = step(model, ids[:, 4:], cache, positions=jnp.arange(4, 6)[None])
    np.testing.assert_array_equal(cache.positions, np.tile(np.arange(6), (3, 1)))
    np.testing.assert_allclose(out, whole(model, ids)[:, 4:], atol=1e-5)


def test_a_finished_row_leaves_others_and_itself_alone(tiny, tokens):
    """Rows that have ended feed invalid tokens; a row that goes on afterwards counts its real tokens only."""
    model = tiny("gpt2")
    ids = tokens(model.config, 2, 6)
    mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1]])
    found, _ = in_pieces(model, ids, mask, (3, 1, 1, 1))
    np.testing.assert_allclose(found[0], whole(model, ids[:1])[0], atol=1e-5)
    kept = ids[1:, jnp.array([0, 1, 2, 5])]
    np.testing.assert_allclose(found[1, 5], whole(model, kept)[0, 3], atol=1e-5)


def test_a_cache_has_the_models_compute_type_and_kv_heads(tiny):
    model = tiny("llama", dtype="bfloat16")
    cache = jax.eval_shape(lambda: empty_cache(model.config, 2, 8))
    arrays = [leaf for leaf in jax.tree.leaves(cache) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in arrays} == {jnp.dtype("bfloat16")}
    assert (
        sum(leaf.size for leaf in arrays) == 2 * 2 * 2 * 8 * 2 * 6
    )  # k and v, layers, batch, slots, kv heads, head_dim


def test_a_cache_that_grew_holds_what_it_held(tiny, tokens):
    model = tiny("llama")
    ids = tokens(model.config, 2, 6)
    _, cache = step(model, ids[:, :4], empty_cache(model.config, 2, 4))
    assert grow_cache(cache, 3) is cache
    out, cache = step(model, ids[:, 4:], grow_cache(cache, 9))
    assert cache.valid.shape == (2, 9)
    np.testing.assert_allclose(out, whole(model, ids)[:, 4:], atol=1e-5)


def test_errors(tiny, tokens):
    model = tiny("gpt2")
    with pytest.raises(ValueError, match=r"slots must be at most the model's 24 positions, got 25"):
        empty_cache(model.config, 1, 25)
    cache = empty_cache(model.config, 1, 4)
    ids = tokens(model.config, 1, 5)
    with pytest.raises(ValueError, match="inputs must have at most the cache's 4 slots, got 5"):
        model.encode(ids, cache=cache)
    with pytest.raises(ValueError, match="segment_ids cannot be combined with a cache"):
        model.encode(ids[:, :2], cache=cache, segment_ids=jnp.zeros((1, 2), jnp.int32))
