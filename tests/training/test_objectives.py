"""The next-token loss against the logits it never holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effscale.models import (
    Transformer,
    add_lora,
    bert,
    bert_pretraining_heads,
    gpt2,
    gptj,
    opt,
)
from effscale.models.transformer import run_group
from effscale.training import masked_token_loss, next_token_loss

VOCAB = 23
MODELS = {
    "tied": gpt2(num_layers=2, d_model=16, num_heads=2, vocab_size=VOCAB, max_length=8),
    "untied with a bias": gptj(
        num_layers=1, d_model=16, num_heads=2, rotary_dim=4, vocab_size=VOCAB
    ),
    "tied and narrower": opt(
        num_layers=1,
        d_model=16,
        num_heads=2,
        d_embed=8,
        vocab_size=VOCAB,
        max_length=8,
        post_norm=True,
    ),
}


def slow_loss(model, batch, z_loss=0.0):
    """Sum and weight from whole logits, in float64."""
    extra = {k: batch[k] for k in ("segment_ids", "positions") if k in batch}
    logits = np.asarray(model(batch["input_ids"], **extra), np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    total = weight = 0.0
    for row, col in np.ndindex(batch["labels"].shape):
        label = batch["labels"][row, col]
        if not 0 <= label < VOCAB:
            continue
        w = batch["loss_weights"][row, col] if "loss_weights" in batch else 1.0
        total += w * (log_z[row, col] - logits[row, col, label] + z_loss * log_z[row, col] ** 2)
        weight += w
    return total, weight


def make_batch(**extra):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (3, 9)).astype(np.int32)
    labels = tokens[:, 1:].copy()
    labels[0, :3] = -100
    labels[1, 4] = VOCAB
    batch = {"input_ids": tokens[:, :-1], "labels": labels, **extra}
    return {name: jnp.asarray(value) for name, value in batch.items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_equals_the_cross_entropy_of_whole_logits(name, z_loss):
    model = Transformer(MODELS[name], rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    segments = np.sort(rng.integers(1, 3, (3, 8)), axis=1).astype(np.int32)
    for batch in (
        make_batch(),
        make_batch(loss_weights=rng.uniform(0, 1, (3, 8)).astype(np.float32), segment_ids=segments),
    ):
        loss = next_token_loss(model, batch, z_loss=z_loss)
        total, weight = slow_loss(model, batch, z_loss)
        np.testing.assert_allclose(loss.total, total, rtol=1e-5)
        np.testing.assert_allclose(loss.weight, weight, rtol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_its_gradient_is_that_of_whole_logits(name):
    model = Transformer(MODELS[name], rngs=nnx.Rngs(0))
    batch = make_batch(labels=np.arange(24, dtype=np.int32).reshape(3, 8) % VOCAB)

    def plain(model):
        logits = jax.nn.log_softmax(model(batch["input_ids"]), axis=-1)
        return -jnp.take_along_axis(logits, batch["labels"][..., None], -1).sum()

    ours = jax.grad(lambda m: next_token_loss(m, batch).total)(model)
    for got, wanted in zip(
        jax.tree.leaves(ours), jax.tree.leaves(jax.grad(plain)(model)), strict=True
    ):
        scale = float(jnp.abs(wanted).max())
        np.testing.assert_allclose(got, wanted, atol=1e-5 * scale + 1e-7)


def test_a_head_with_lora_trains():
    model = Transformer(MODELS["tied"], rngs=nnx.Rngs(0))
    adapted = add_lora(model, rank=2, key=jax.random.key(0), where="kernel|tokens.embedding")
    batch = make_batch()
    np.testing.assert_allclose(
        next_token_loss(adapted, batch).total, next_token_loss(model, batch).total, rtol=1e-5
    )
    gradient = jax.grad(lambda m: next_token_loss(m, batch).total)(adapted)
    assert float(jnp.abs(gradient.embed.tokens.embedding.get_value().b).max()) > 0


def test_masked_tokens_equal_the_cross_entropy_of_whole_logits():
    config = bert(
        num_layers=2,
        d_model=16,
        num_heads=2,
        vocab_size=VOCAB,
        max_length=8,
        heads=bert_pretraining_heads(),
    )
    model = Transformer(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(2)
    ids = rng.integers(0, VOCAB, (3, 8))
    labels = np.where(rng.random((3, 8)) < 0.4, ids, -100)
    mask = np.arange(8)[None] < np.array([8, 5, 3])[:, None]
    types = (np.arange(8)[None] >= 4) & np.ones((3, 1), bool)
    batch = {
        "input_ids": jnp.asarray(ids, jnp.int32),
        "labels": jnp.asarray(labels, jnp.int32),
        "attention_mask": jnp.asarray(mask, jnp.int32),
        "type_ids": jnp.asarray(types, jnp.int32),
    }
    outputs = model(
        batch["input_ids"], attention_mask=batch["attention_mask"], type_ids=batch["type_ids"]
    )
    logits = np.asarray(outputs["mlm"], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows, cols = np.nonzero(labels >= 0)
    loss = masked_token_loss(model, batch)
    np.testing.assert_allclose(loss.total, -log_p[rows, cols, labels[rows, cols]].sum(), rtol=1e-5)
    assert float(loss.weight) == len(rows)


@pytest.mark.parametrize("objective", [next_token_loss, masked_token_loss])
def test_groups_are_run_as_asked(objective):
    config = {
        next_token_loss: MODELS["tied"],
        masked_token_loss: bert(
            num_layers=2,
            d_model=16,
            num_heads=2,
            vocab_size=VOCAB,
            max_length=8,
            heads=bert_pretraining_heads(),
        ),
    }[objective]
    model = Transformer(config, rngs=nnx.Rngs(0))
    seen = []

    def skip(index, group, x, context, cache, key):
        seen.append((index, x.shape))
        return x, cache, ()

    batch = make_batch()
    skipped = objective(model, batch, run_group=skip)
    assert seen == [(0, (3, 8, 16))]
    whole = objective(model, batch)
    assert float(skipped.total) != float(whole.total)
    np.testing.assert_array_equal(objective(model, batch, run_group=run_group).total, whole.total)
