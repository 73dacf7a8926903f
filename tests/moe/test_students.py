"""Mixture of Students: the loss, and the teacher that leaves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effscale.models import MLPConfig, Transformer, gpt2
from effscale.moe import (
    MoEConfig,
    mixture_of_students_loss,
    staged_distillation,
    with_experts,
)
from effscale.training import create_train_state, make_train_step, next_token_loss

IDS = jnp.asarray(np.random.default_rng(0).integers(0, 23, (2, 9)), jnp.int32)
BATCH = {"input_ids": IDS[:, :-1], "labels": IDS[:, 1:].at[0, :3].set(-100)}


def make(layers, experts):
    dense = gpt2(num_layers=layers, d_model=16, num_heads=2, vocab_size=23, max_length=16)
    moe = MoEConfig(num_experts=2, expert=MLPConfig(d_ff=16), shared=MLPConfig(d_ff=16))
    config = with_experts(dense, moe, experts)
    return jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(layers)))()


@pytest.fixture(scope="module")
def models():
    return make(3, [2]), make(4, [2, 4])


def test_the_loss_is_that_of_the_language_and_the_divergence(models):
    """In NumPy, of whole logits; positions without a label count in neither part, the teacher's auxiliary loss nowhere."""
    student, teacher = models
    temperature, alpha = 2.0, 0.5
    loss = functools.partial(mixture_of_students_loss, temperature=temperature, alpha=alpha)
    found = jax.jit(loss)(student, BATCH, None, teacher)
    plain = jax.jit(next_token_loss)(student, BATCH)
    logits = [np.asarray(jax.jit(lambda m: m(BATCH["input_ids"]))(m), np.float64) for m in models]
    own, other = (
        z / temperature - np.log(np.exp(z / temperature).sum(-1, keepdims=True)) for z in logits
    )
    each = (np.exp(other) * (other - own)).sum(-1)
    divergence = each[np.asarray(BATCH["labels"]) >= 0].sum()
    np.testing.assert_allclose(found.metrics["divergence"], divergence, rtol=1e-4)
    np.testing.assert_allclose(found.total, plain.total + alpha * 4 * divergence, rtol=1e-5)
    assert found.metrics["task_loss"] == plain.metrics["task_loss"]
    assert found.weight == plain.weight == 13


def test_the_teacher_leaves(models):
    """Up to the stop the loss holds the divergence; then the step is that of the language model alone, bit for bit."""
    student, teacher = models
    optimizer = optax.sgd(0.1)
    step = staged_distillation(make_train_step(mixture_of_students_loss, optimizer), 2)
    alone = jax.jit(make_train_step(next_token_loss, optimizer))
    state = create_train_state(student, optimizer, key=jax.random.key(0))
    seen = []
    for number in range(4):
        before = jax.tree.map(jnp.copy, state)
        state, metrics = step(state, step.before_step(number, BATCH), frozen=teacher)
        seen.append("divergence" in metrics)
    assert seen == [True, True, False, False]
    expected, _ = alone(before, BATCH)
    for a, b in zip(jax.tree.leaves(state.model), jax.tree.leaves(expected.model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bad_input():
    with pytest.raises(ValueError, match="stop=0"):
        staged_distillation(lambda state, batch: (state, {}), 0)
