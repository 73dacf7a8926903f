"""A BLOOM learns here what it learns in transformers: from the same weights, batches and AdamW."""

import jax
import numpy as np
import optax
import pytest

from effscale.interop import load_pretrained
from effscale.training import Clip, create_train_state, make_train_step, next_token_loss

torch = pytest.importorskip("torch", reason="the extra torch is not installed")
transformers = pytest.importorskip("transformers", reason="the extra torch is not installed")

STEPS, ROWS, LENGTH, VOCAB = 50, 4, 32, 96
RATE, DECAY, CLIP = 1e-3, 0.1, 1.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=48, n_layer=3, n_head=6)
    place = tmp_path_factory.mktemp("bloom")
    transformers.BloomForCausalLM(config).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def batches():
    """Rows in which each token follows from the one before, but for some noise: there is something to learn."""
    rng = np.random.default_rng(0)
    follows = rng.permutation(VOCAB)
    rows = np.empty((STEPS, ROWS, LENGTH + 1), np.int32)
    rows[..., 0] = rng.integers(0, VOCAB, (STEPS, ROWS))
    for place in range(LENGTH):
        noise = rng.integers(0, VOCAB, (STEPS, ROWS))
        known = rng.random((STEPS, ROWS)) < 0.8
        rows[..., place + 1] = np.where(known, follows[rows[..., place]], noise)
    return rows


def theirs(folder, batches):
    model = transformers.BloomForCausalLM.from_pretrained(folder).train()
    options = {"lr": RATE, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": DECAY}
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    losses = []
    for rows in batches:
        ids = torch.from_numpy(rows.astype(np.int64))
        logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


def ours(folder, batches):
    optimizer = optax.adamw(RATE, b1=0.9, b2=0.95, eps=1e-8, weight_decay=DECAY)
    step = jax.jit(make_train_step(next_token_loss, optimizer, clip=Clip(CLIP)))
    state = create_train_state(load_pretrained(folder), optimizer, key=jax.random.key(0))
    losses = []
    for rows in batches:
        state, metrics = step(state, {"input_ids": rows[:, :-1], "labels": rows[:, 1:]})
        losses.append(float(metrics["loss"]))
    return np.array(losses)


def test_fifty_steps_are_those_of_transformers(folder, batches):
    expected = theirs(folder, batches)
    assert expected[-5:].mean() < expected[:5].mean() - 0.5  # it learns
    np.testing.assert_allclose(ours(folder, batches), expected, atol=1e-3)
