"""What models say of responses: the same as while they were drawn, in every family, however prompts are padded."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effscale.generation import SamplingConfig, decode
from effscale.models import ClassHead, Transformer, bloom, gpt2, gptj, llama, neox, opt
from effscale.rlhf import response_log_probs, response_scores, response_values

FAMILIES = {
    "gpt2": functools.partial(gpt2, max_length=24),
    "llama": functools.partial(llama, d_ff=48),
    "opt": functools.partial(opt, max_length=24),
    "bloom": bloom,
    "gptj": functools.partial(gptj, rotary_dim=4),
    "neox": neox,
}
SHAPE = {"num_layers": 2, "d_model": 32, "num_heads": 4, "vocab_size": 61}
PROMPT = jnp.asarray(np.random.default_rng(0).integers(1, 61, (3, 7)), jnp.int32)
MASK = jnp.asarray(np.arange(7)[None] >= np.array([[0], [3], [6]]))


def make(family="gpt2", heads=None, seed=0):
    config = dataclasses.replace(FAMILIES[family](**SHAPE), init_std=0.3)
    if heads:
        config = dataclasses.replace(config, heads=heads)
    return jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(seed)))()


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_the_drawing(family):
    model = make(family)
    sampling = SamplingConfig(
        max_new_tokens=9, temperature=0.7, stop_token_ids=(5, 6, 7, 8), pad_token_id=0
    )
    given = {"attention_mask": MASK, "key": jax.random.key(1), "log_probs": True}
    drawn = decode(model, PROMPT, sampling, **given)
    again = jax.jit(response_log_probs, static_argnames=("response", "temperature"))
    found = again(model, drawn.tokens, drawn.mask, response=9, temperature=0.7)
    real = drawn.mask[:, 7:]
    np.testing.assert_allclose(found.log_probs[real], drawn.log_probs[real], atol=1e-5)


def test_entropies_against_numpy():
    """Over more tokens than a chunk has, and not a multiple of it."""
    model = make()
    rng = np.random.default_rng(2)
    tokens = jnp.asarray(rng.integers(0, 61, (41, 20)), jnp.int32)
    mask = jnp.ones((41, 20), bool)
    run = jax.jit(lambda m, t: response_log_probs(m, t, mask, 13, temperature=2.0))
    found = run(model, tokens)
    logits = np.asarray(jax.jit(lambda m, t: m(t))(model, tokens), np.float64)[:, 6:-1] / 2.0
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_probs, np.asarray(tokens)[:, 7:, None], 2)[..., 0]
    np.testing.assert_allclose(found.log_probs, chosen, atol=1e-5)
    entropies = -(np.exp(log_probs) * log_probs).sum(-1)
    np.testing.assert_allclose(found.entropies, entropies, atol=1e-5)


def test_values_and_scores_do_not_see_padding():
    critic = make(heads=(ClassHead(num_classes=1, name="value", pool="none"),))
    reward = make(heads=(ClassHead(num_classes=1, name="score", pool="last"),))
    tokens = jnp.asarray(np.random.default_rng(3).integers(1, 61, (1, 8)), jnp.int32)
    padded = jnp.pad(tokens, ((0, 0), (3, 2)))
    mask = jnp.pad(jnp.ones((1, 8), bool), ((0, 0), (3, 2)))
    plain = jnp.ones((1, 8), bool)
    values = response_values(critic, tokens, plain, 4)
    np.testing.assert_allclose(response_values(critic, padded, mask, 6)[:, :4], values, atol=1e-5)
    whole = critic(tokens)["value"][:, 3:-1, 0]
    np.testing.assert_allclose(values, whole, atol=1e-6)
    scores = response_scores(reward, tokens, plain)
    np.testing.assert_allclose(response_scores(reward, padded, mask), scores, atol=1e-5)


def test_bad_input():
    tokens, mask = jnp.ones((1, 8), jnp.int32), jnp.ones((1, 8), bool)
    with pytest.raises(
        ValueError, match=r"response must be at least 1 and leave a prompt .* got 8"
    ):
        response_log_probs(make(), tokens, mask, 8)
    with pytest.raises(ValueError, match=r"head must be one of the model's heads, .* got 'value'"):
        response_values(make(), tokens, mask, 4)
    pooled = make(heads=(ClassHead(num_classes=1, name="value", pool="last"),))
    with pytest.raises(ValueError, match="pool='none'"):
        response_values(pooled, tokens, mask, 4)
    several = make(heads=(ClassHead(num_classes=3, name="score", pool="last"),))
    with pytest.raises(ValueError, match=r"the head 'score' must return one number .* got 3"):
        response_scores(several, tokens, mask)


def test_scores_after_each_token_are_one_at_the_last():
    """A reward model can become a critic: its head gives a number after each token, and the score is that at the end."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 20, (3, 8)), jnp.int32)
    mask = jnp.arange(8)[None] < jnp.array([[8], [5], [3]])
    found = [
        response_scores(
            make(heads=(ClassHead(num_classes=1, name="score", pool=pool),)), tokens, mask
        )
        for pool in ("last", "none")
    ]
    np.testing.assert_allclose(*found, atol=1e-6)
