"""Low-rank adaptation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effscale.models import LoRA, add_lora, is_adapter, matmul, merge_lora, unmerge_lora, unroll
from effscale.models.weights import dense
from effscale.training.partition import named_leaves

EVERY_MATRIX = r"kernel$|tokens\.embedding$"
run = jax.jit(lambda model, ids: model(ids))


def adapted_model(model, key, *, trained=True, **options):
    model = add_lora(model, **{"rank": 3, "key": key, "where": EVERY_MATRIX} | options)
    if not trained:
        return model
    random = np.random.default_rng(0)
    noise = lambda path, leaf: (
        leaf + 0.1 * random.normal(size=leaf.shape).astype(np.float32)
        if path[-1] == jax.tree_util.GetAttrKey("b")
        else leaf
    )
    return jax.tree_util.tree_map_with_path(noise, model)


@pytest.mark.parametrize("name", ["gpt2", "opt-350m", "gptj", "llama"])
def test_it_starts_unchanged_and_merges(name, tiny, tokens, getkey):
    model = tiny(name)
    ids = tokens(model.config)
    fresh = adapted_model(model, getkey(), trained=False)
    np.testing.assert_array_equal(run(fresh, ids), run(model, ids))

    trained = adapted_model(model, getkey(), alpha=6.0)
    logits = run(trained, ids)
    assert float(jnp.abs(logits - run(model, ids)).max()) > 0.1
    merged = merge_lora(trained)
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    np.testing.assert_allclose(run(merged, ids), logits, atol=2e-4)

    back = unmerge_lora(trained)
    assert jax.tree.structure(back) == jax.tree.structure(model)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(model), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_it_is_the_papers_equation(getkey):
    w, a, b, x = (jax.random.normal(getkey(), shape) for shape in ((4, 6), (4, 2), (2, 6), (3, 4)))
    pair = LoRA(w, a, b, 0.5)
    full = np.asarray(w) + 0.5 * np.asarray(a) @ np.asarray(b)
    np.testing.assert_allclose(matmul(x, pair), np.asarray(x) @ full, atol=1e-5)
    np.testing.assert_allclose(pair.dense(), full, atol=1e-5)
    np.testing.assert_allclose(
        matmul(jnp.ones((2, 6)), pair.T), np.ones((2, 6)) @ full.T, atol=1e-5
    )
    np.testing.assert_allclose(dense(pair.T), full.T, atol=1e-5)
    np.testing.assert_allclose(pair.take(jnp.array([[2, 0]])), full[np.array([[2, 0]])], atol=1e-5)
    assert (pair.shape, pair.dtype) == ((4, 6), jnp.float32)
    assert matmul(x.astype(jnp.bfloat16), pair).dtype == jnp.bfloat16


def test_a_pair_of_another_type_than_its_base(getkey):
    """As an adapter in float32 of a model in bfloat16: W' keeps the model's type and is rounded once."""
    w, a, b = (jax.random.normal(getkey(), shape) for shape in ((4, 6), (4, 2), (2, 6)))
    narrow = w.astype(jnp.bfloat16)
    full = (narrow.astype(jnp.float32) + a @ b * 0.5).astype(jnp.bfloat16)
    np.testing.assert_array_equal(LoRA(narrow, a, b, 0.5).dense(), full)
    rows = LoRA(narrow, a, b, 0.5).take(jnp.array([2, 0]))
    np.testing.assert_array_equal(rows, full[jnp.array([2, 0])])
    assert rows.dtype == jnp.bfloat16


def test_gradients_reach_both_matrices(tiny, tokens, getkey):
    """At the start B is zero, so that only B has a gradient; then A has one, too."""
    model = tiny("gpt2")
    ids = tokens(model.config)
    gradient = jax.jit(jax.grad(lambda model: jax.nn.logsumexp(model(ids), -1).sum()))
    for trained in (False, True):
        grads = gradient(adapted_model(model, getkey(), trained=trained))
        adapters = {
            leaf.name: np.abs(leaf.leaf) for leaf in named_leaves(grads) if is_adapter(leaf.name)
        }
        assert len(adapters) == 2 * 7
        for name, grad in adapters.items():
            moves = trained or name.endswith(".b")
            assert (grad.reshape(-1, *grad.shape[-2:]).max((1, 2)) > 0).all() == moves, (
                name
            )  # in every layer


def test_layers_and_weights_start_different(tiny, getkey):
    model = adapted_model(tiny("gpt2"), getkey(), trained=False)
    block = model.groups[0].blocks[0].attention
    query, key = block.query.kernel.get_value().a, block.key.kernel.get_value().a
    assert query.shape == (2, 24, 3)
    assert not jnp.array_equal(query[0], query[1])
    assert not jnp.array_equal(query, key)
    assert float(jnp.abs(query).max()) <= 24**-0.5


def test_unrolled(tiny, tokens, getkey):
    model = adapted_model(tiny("llama"), getkey())
    ids = tokens(model.config)
    np.testing.assert_allclose(run(unroll(model), ids), run(model, ids), atol=1e-5)


def test_scale_is_alpha_over_rank(tiny, getkey):
    scale = lambda **options: (
        adapted_model(tiny("gpt2"), getkey(), trained=False, **options)
        .embed.tokens.embedding.get_value()
        .scale
    )
    assert scale(rank=4, alpha=32.0) == 8.0
    assert scale(rank=4) == 1.0


def test_errors(tiny, getkey):
    model = tiny("gpt2")
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        add_lora(model, rank=0, key=getkey())
    with pytest.raises(ValueError, match=r"already has a LoRA pair\. Call merge_lora"):
        add_lora(add_lora(model, rank=1, key=getkey()), rank=1, key=getkey())
    with pytest.raises(ValueError, match=r"where='nothing' matches no parameter"):
        add_lora(model, rank=1, key=getkey(), where="nothing")
    assert jax.tree.structure(merge_lora(model)) == jax.tree.structure(
        model
    )  # nothing to merge is no error
