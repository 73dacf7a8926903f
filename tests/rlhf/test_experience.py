"""From responses to a step of PPO: the ratio is 1 at first, and micro-batches change nothing; test_step.py learns with it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effscale.generation import SamplingConfig, decode
from effscale.models import ClassHead, MLPConfig, Transformer, gpt2
from effscale.moe import MoEConfig, with_experts
from effscale.rlhf import (
    PPOConfig,
    actor_loss,
    critic_loss,
    make_experience,
    response_log_probs,
    response_values,
)
from effscale.training import create_train_state, make_train_step

VOCAB, RESPONSE = 23, 6
SAMPLING = SamplingConfig(
    max_new_tokens=RESPONSE, temperature=0.9, stop_token_ids=(1,), pad_token_id=0
)
PROMPT = jnp.asarray(np.random.default_rng(0).integers(2, VOCAB, (16, 4)), jnp.int32)
MASK = jnp.asarray(np.arange(4)[None] >= np.arange(16)[:, None] % 3)
CONFIG = PPOConfig(missing_end_penalty=0.5)


def make(heads=None, seed=0):
    config = gpt2(num_layers=2, d_model=16, num_heads=2, vocab_size=VOCAB, max_length=10)
    config = dataclasses.replace(config, init_std=0.2, **({"heads": heads} if heads else {}))
    return jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(seed)))()


def value_model():
    return make((ClassHead(num_classes=1, name="value", pool="none"),), seed=1)


@jax.jit
def rollout(actor, reference, critic, key):
    drawn = decode(actor, PROMPT, SAMPLING, attention_mask=MASK, key=key, log_probs=True)
    given = (drawn.tokens, drawn.mask, RESPONSE)
    priors = response_log_probs(reference, *given, temperature=0.9).log_probs
    # Even tokens are good.
    answer = drawn.tokens[:, 4:]
    good = ((answer % 2 == 0) & drawn.mask[:, 4:]).sum(1).astype(jnp.float32)
    values = response_values(critic, *given)
    return make_experience(drawn, priors, values, good, stop_token_ids=(1,), config=CONFIG)


def test_a_step_begins_at_the_policy_that_drew():
    actor, critic = make(), value_model()
    experience, metrics = rollout(actor, actor, critic, jax.random.key(0))
    np.testing.assert_allclose(metrics["kl"], 0, atol=1e-4)
    loss = jax.jit(functools.partial(actor_loss, config=CONFIG, temperature=0.9))(actor, experience)
    found = loss.means()
    np.testing.assert_allclose(found["ratio"], 1, atol=1e-5)
    np.testing.assert_allclose(found["clip_fraction"], 0)
    assert 0 < found["entropy"] < np.log(VOCAB)
    # Whitened advantages have a mean of 0, and so has the loss where all ratios are 1.
    np.testing.assert_allclose(loss.mean(), 0, atol=1e-5)


def test_micro_batches_are_one_batch():
    actor, critic = make(), value_model()
    experience, _ = rollout(actor, make(seed=2), critic, jax.random.key(0))
    optimizer = optax.sgd(0.1)
    for model, loss in ((make(), actor_loss), (value_model(), critic_loss)):
        stepped = []
        for accumulate in (1, 4):
            state = create_train_state(model, optimizer, key=jax.random.key(0))
            step = jax.jit(make_train_step(loss, optimizer, accumulate=accumulate))
            stepped.append(step(state, experience)[0].model)
        for a, b in zip(*(jax.tree.leaves(m) for m in stepped), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_critic_with_experts_balances_them():
    actor = make()
    experience, _ = rollout(actor, actor, value_model(), jax.random.key(0))
    config = with_experts(value_model().config, MoEConfig(num_experts=4, expert=MLPConfig(d_ff=16)))
    critic = jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()
    loss = jax.jit(critic_loss)(critic, experience)
    found = loss.means()
    assert found["aux_loss"] > 0
    np.testing.assert_allclose(loss.mean(), found["task_loss"] + found["aux_loss"], rtol=1e-5)


def test_minibatches_are_a_permutation():
    experience, _ = rollout(make(), make(), value_model(), jax.random.key(0))
    parts = list(experience.minibatches(4, jax.random.key(3)))
    together = np.concatenate([part.tokens for part in parts])
    assert not np.array_equal(together, experience.tokens)
    ordered = lambda rows: sorted(map(tuple, np.asarray(rows).tolist()))
    assert ordered(together) == ordered(experience.tokens)
    with pytest.raises(ValueError, match="number must divide the number of responses, 16, got 3"):
        next(experience.minibatches(3, jax.random.key(0)))


def test_a_cut_off_response_pays():
    """By the penalty, at its last token; a response that ended does not."""
    actor = make()
    drawn = decode(
        actor, PROMPT, SAMPLING, attention_mask=MASK, key=jax.random.key(0), log_probs=True
    )
    given = (drawn, drawn.log_probs, jnp.zeros_like(drawn.log_probs), jnp.zeros(16))
    plain = PPOConfig(whiten_advantages=False, lam=1.0, missing_end_penalty=0.5)
    experience, metrics = make_experience(*given, stop_token_ids=(1,), config=plain)
    ended = ((np.asarray(drawn.tokens[:, 4:]) == 1) & np.asarray(drawn.mask[:, 4:])).any(1)
    assert 0 < ended.sum() < 16
    np.testing.assert_allclose(metrics["ended"], ended.mean())
    np.testing.assert_allclose(experience.returns[:, 0], np.where(ended, 0, -0.5), atol=1e-6)
    with pytest.raises(ValueError, match="log_probs=True"):
        make_experience(dataclasses.replace(drawn, log_probs=None), *given[1:])


@pytest.mark.parametrize(
    "option",
    [{"kl_coef": -1.0}, {"score_clip": 0.0}, {"gamma": 1.5}],
    ids=str,
)
def test_bad_input(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        PPOConfig(**option)
