"""What comes out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effscale.models import (
    ClassHead,
    LMHead,
    PatchInputs,
    Transformer,
    bert,
    bert_pretraining_heads,
    gpt2,
    replace_heads,
    vit,
)

MASK = jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


def test_outputs_of_a_language_model_are_its_logits(causal_family, tiny, tokens):
    model = tiny(causal_family)
    ids = tokens(model.config)
    logits = jax.eval_shape(lambda m: m(ids), model)
    assert logits.shape == (3, 9, 37)


def test_outputs_of_the_others_are_a_dict(tiny, tokens):
    model = tiny("bert")
    out = jax.eval_shape(lambda m: m(tokens(model.config)), model)
    assert {name: leaf.shape for name, leaf in out.items()} == {
        "hidden": (3, 9, 24),
        "pooled": (3, 24),
        "mlm": (3, 9, 37),
        "nsp": (3, 2),
    }
    out = jax.eval_shape(lambda m: m(jnp.ones((2, 8, 8, 3))), tiny("vit"))
    assert {name: leaf.shape for name, leaf in out.items()} == {
        "hidden": (2, 5, 24),
        "classes": (2, 5),
    }
    out = jax.eval_shape(lambda m: m(tokens(m.config)), tiny("gpt2", heads=()))
    assert set(out) == {"hidden"}
    value = ClassHead(num_classes=1, name="value", pool="none")
    out = jax.eval_shape(lambda m: m(tokens(m.config)), tiny("gpt2", heads=(LMHead(), value)))
    assert {name: leaf.shape for name, leaf in out.items()} == {
        "hidden": (3, 9, 24),
        "lm": (3, 9, 37),
        "value": (3, 9, 1),
    }


@pytest.mark.parametrize("pool", ["first", "last", "mean", "none"])
@pytest.mark.parametrize("masked", [True, False])
def test_pooling(pool, masked, tiny, tokens):
    model = tiny("gpt2", heads=(ClassHead(num_classes=4, pool=pool),))
    ids = tokens(model.config, 3, 5)
    out = jax.jit(lambda m, mask: m(ids, attention_mask=mask))(model, MASK if masked else None)
    hidden = np.asarray(out["hidden"])
    rows = {
        "first": hidden[:, 0],
        "last": hidden[np.arange(3), [4, 2, 4] if masked else [4, 4, 4]],
        "mean": np.stack([hidden[0, 2:].mean(0), hidden[1, :3].mean(0), hidden[2].mean(0)])
        if masked
        else hidden.mean(1),
        "none": hidden,
    }[pool]
    head = model.heads["classes"].dense
    np.testing.assert_allclose(
        out["classes"], rows @ np.asarray(head.kernel[...]) + np.asarray(head.bias[...]), atol=1e-5
    )


def test_a_classifier_on_every_family(family, tiny, tokens):
    """At the width that comes out, pooled in every way that the model has."""
    pools = ["first", "last", "mean", "none", *(["pooled"] if tiny(family).config.pooler else [])]
    heads = tuple(ClassHead(num_classes=4, name=f"by_{pool}", pool=pool) for pool in pools)
    model = tiny(family, heads=heads)
    images = isinstance(model.config.inputs, PatchInputs)
    x = jnp.ones((3, 8, 8, 3)) if images else tokens(model.config)
    out = jax.eval_shape(lambda m: m(x), model)
    seq = out["hidden"].shape[1]
    for head in heads:
        assert out[head.name].shape == ((3, seq, 4) if head.pool == "none" else (3, 4))


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_the_poolers_activation(activation, tiny, tokens):
    plain = tiny("bert", pooler_activation="linear")
    model = tiny("bert", pooler_activation=activation)
    ids = tokens(model.config)
    pooled = jax.jit(lambda m: m(ids)["pooled"])
    np.testing.assert_allclose(pooled(model), getattr(jax.nn, activation)(pooled(plain)), atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "opt-350m", "gptj", "llama", "bert", "bert-untied"])
def test_linear_takes_the_last_map_apart(name, tiny, tokens):
    untied = {"heads": bert_pretraining_heads(tied=False)} if name == "bert-untied" else {}
    name = name.removesuffix("-untied")
    model = tiny(name, **untied)
    ids = tokens(model.config)

    @jax.jit
    def both(model):
        hidden = model.encode(ids).hidden
        head = model.heads["mlm" if name == "bert" else "lm"]
        x, weight, bias = head.linear(hidden, model.embed)
        logits = x @ weight.T
        return logits if bias is None else logits + bias[None, None], head(
            hidden, None, model.embed, None
        )

    apart, whole = both(model)
    assert apart.shape == (3, 9, 37)
    np.testing.assert_allclose(apart, whole, atol=1e-5)


def test_an_untied_head_on_an_embedding_of_another_width(tiny, tokens):
    model = tiny("opt-350m", heads=(LMHead(tied=False),))
    assert model.heads["lm"].project.kernel[...].shape == (16, 37)
    assert jax.eval_shape(lambda m: m(tokens(m.config)), model).shape == (3, 9, 37)


def test_a_tied_head_has_no_matrix_of_its_own(tiny):
    assert jax.tree.leaves(tiny("gpt2").heads["lm"]) == []


def test_patches_are_read_row_by_row(tiny):
    """A projection that sums: patch (0, 1) is the second token."""
    model = tiny("vit")
    zero = jax.tree.map(jnp.zeros_like, model.embed)
    zero.patches.kernel[...] = jnp.ones_like(zero.patches.kernel[...])
    images = jnp.zeros((1, 8, 8, 3)).at[0, 1, 6, 2].set(1.0).at[0, 5, 0, 0].set(10.0)
    out = zero(images, jnp.arange(5)[None])
    np.testing.assert_array_equal(out[0, :, 0], [0, 0, 1, 10, 0])


def test_errors(tiny, tokens):
    with pytest.raises(
        ValueError, match=r"pool='pooled' needs a pooler\. Set TransformerConfig\.pooler=True"
    ):
        Transformer(
            bert(
                num_layers=1,
                d_model=8,
                num_heads=2,
                pooler=False,
                heads=(ClassHead(num_classes=2, pool="pooled"),),
            ),
            rngs=nnx.Rngs(0),
        )
    images = dataclasses.replace(
        vit(num_layers=1, d_model=8, num_heads=2, image_size=8, patch_size=4), heads=(LMHead(),)
    )
    with pytest.raises(ValueError, match="LMHead needs token inputs"):
        Transformer(images, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match="the sequence length must be at most the model's 24 positions, got 25"
    ):
        tiny("gpt2")(tokens(gpt2(num_layers=1, d_model=8, num_heads=1), 1, 25))
    with pytest.raises(
        ValueError, match=r"images must have the shape \(8, 8, 3\), got \(8, 9, 3\)"
    ):
        tiny("vit")(jnp.ones((1, 8, 9, 3)))
    with pytest.raises(ValueError, match="type_ids needs a model with token types"):
        tiny("gpt2")(jnp.zeros((1, 4), jnp.int32), type_ids=jnp.zeros((1, 4), jnp.int32))


def test_a_head_that_pools_otherwise_keeps_its_weights():
    config = gpt2(num_layers=1, d_model=16, num_heads=2, vocab_size=50, max_length=8)
    each = ClassHead(num_classes=1, name="score", pool="none", bias=False)
    config = dataclasses.replace(config, heads=(each,))
    model = jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()
    at_end = dataclasses.replace(each, pool="last")
    tokens = jnp.arange(6, dtype=jnp.int32)[None]
    changed = replace_heads(model, [at_end], key=jax.random.key(1))
    expected = model(tokens)["score"][:, -1]
    np.testing.assert_allclose(changed(tokens)["score"], expected, rtol=1e-6)
    # Another number of classes is another head.
    other = replace_heads(
        model, [dataclasses.replace(at_end, num_classes=2)], key=jax.random.key(1)
    )
    assert other(tokens)["score"].shape == (1, 2)
