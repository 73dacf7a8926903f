"""Losses over batches of pairs: what a reward model learns by, part by part."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effscale.models import ClassHead, Transformer, gpt2, replace_heads
from effscale.rlhf import pairwise_loss, response_log_probs, response_scores, reward_model_loss

SCORE = ClassHead(num_classes=1, name="score", pool="none", bias=False)
ROWS, LENGTH, VOCAB = 4, 10, 32


@pytest.fixture(scope="module")
def model():
    config = gpt2(num_layers=1, d_model=16, num_heads=2, vocab_size=VOCAB, max_length=LENGTH)
    config = dataclasses.replace(config, init_std=0.2)
    policy = jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()
    return replace_heads(policy, (*config.heads, SCORE), key=jax.random.key(1))


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    chosen, rejected = rng.integers(1, VOCAB, (2, ROWS, LENGTH)).astype(np.int32)
    prompts = np.array([2, 3, 4, 5], np.int32)
    for row, length in enumerate(prompts):
        rejected[row, :length] = chosen[row, :length]
    lengths = {
        "chosen_lengths": np.array([10, 7, 9, 6]),
        "rejected_lengths": np.array([8, 10, 6, 7]),
    }
    found = {"chosen": chosen, "rejected": rejected, "prompt_lengths": prompts} | lengths
    return {name: jnp.asarray(a, jnp.int32) for name, a in found.items()}


def scores(model, pairs, side):
    mask = jnp.arange(LENGTH)[None] < pairs[f"{side}_lengths"][:, None]
    return response_scores(model, pairs[side], mask)


def test_scores_of_both_responses_are_compared(model, pairs):
    loss = reward_model_loss(model, pairs, center=0.01)
    chosen, rejected = (scores(model, pairs, side) for side in ("chosen", "rejected"))
    expected = pairwise_loss(chosen, rejected, center=0.01)
    np.testing.assert_allclose(loss.mean(), expected, rtol=1e-5)
    means = loss.means()
    assert float(loss.weight) == ROWS
    np.testing.assert_allclose(means["accuracy"], (chosen > rejected).mean())
    np.testing.assert_allclose(means["chosen_score"], chosen.mean(), rtol=1e-5)
    margins = jnp.array([0.0, 1.0, 2.0, 0.5])
    loss = reward_model_loss(model, pairs | {"margins": margins})
    np.testing.assert_allclose(
        loss.mean(), pairwise_loss(chosen, rejected, margin=margins), rtol=1e-5
    )


def test_the_better_response_is_predicted_as_well(model, pairs):
    """A mean over the tokens of each response and over pairs, its end included and the prompt not."""
    plain = reward_model_loss(model, pairs, form="token")
    both = reward_model_loss(model, pairs, form="token", lm_coef=0.5)
    mask = jnp.arange(LENGTH)[None] < pairs["chosen_lengths"][:, None]
    said = response_log_probs(model, pairs["chosen"], mask, LENGTH - 1).log_probs
    each = [
        -np.asarray(said)[row, pairs["prompt_lengths"][row] - 1 : pairs["chosen_lengths"][row] - 1]
        for row in range(ROWS)
    ]
    expected = np.mean([tokens.mean() for tokens in each])
    np.testing.assert_allclose(both.means()["lm_loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(both.mean(), plain.mean() + 0.5 * expected, rtol=1e-5)
    assert "lm_loss" not in plain.metrics


def test_parts_of_a_batch_add_up(model, pairs):
    whole = reward_model_loss(model, pairs, lm_coef=0.5)
    halves = [
        reward_model_loss(model, {name: a[cut] for name, a in pairs.items()}, lm_coef=0.5)
        for cut in (slice(2), slice(2, None))
    ]
    np.testing.assert_allclose(sum(half.total for half in halves), whole.total, rtol=1e-5)


def test_scores_after_each_token_need_a_head_that_gives_them(model, pairs):
    last = replace_heads(model, (dataclasses.replace(SCORE, pool="last"),), key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"form='token' needs a score after each token"):
        reward_model_loss(last, pairs, form="token")
    with pytest.raises(ValueError, match=r"head must be one of the model's heads, .* got 'value'"):
        reward_model_loss(model, pairs, head="value")
    with pytest.raises(ValueError, match=r"lm_coef=0\.5 needs a head named 'lm'"):
        reward_model_loss(last, pairs, lm_coef=0.5)
