"""Mixture of Students: the loss, and the teacher that leaves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effscale.models import MLPConfig, Transformer, gpt2
from effscale.moe import (
    MoEConfig,
    mixture_of_students_loss,
    staged_distillation,
    with_experts,
)
from effscale.moe.students import ALONE
from effscale.training import next_token_loss

IDS = jnp.asarray(np.random.default_rng(0).integers(0, 23, (2, 9)), jnp.int32)
BATCH = {"input_ids": IDS[:, :-1], "labels": IDS[:, 1:].at[0, :3].set(-100)}


def make(layers, experts):
    dense = gpt2(num_layers=layers, d_model=16, num_heads=2, vocab_size=23, max_length=16)
    moe = MoEConfig(num_experts=2, expert=MLPConfig(d_ff=16), shared=MLPConfig(d_ff=16))
    config = dataclasses.replace(with_experts(dense, moe, experts), init_std=0.5)
    return jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(layers)))()


@pytest.fixture(scope="module")
def models():
    return make(2, [2]), make(2, [4])


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
    """From the stop on the batch says so, and the program is that of the language model alone: the teacher is not run."""
    student, teacher = models
    step = staged_distillation(lambda state, batch: (state, {}), 2)
    batches = [step.before_step(number, BATCH) for number in range(4)]
    programs = [
        str(
            jax.make_jaxpr(lambda m, b: mixture_of_students_loss(m, b, None, teacher).total)(
                student, batch
            )
        )
        for batch in batches
    ]
    assert programs[0] == programs[1] != programs[2] == programs[3]
    alone = jax.make_jaxpr(lambda m, b: next_token_loss(m, b).total)(student, BATCH)
    without = lambda m, b: mixture_of_students_loss(
        m, b | {ALONE: batches[2][ALONE]}, None, teacher
    )
    own = jax.make_jaxpr(lambda m, b: without(m, b).total)(student, BATCH)
    count = lambda jaxpr: len(str(jaxpr).splitlines())
    assert count(own) == count(alone) < 0.7 * len(programs[0].splitlines())


def test_bad_input():
    with pytest.raises(ValueError, match="stop must be at least 1, got 0"):
        staged_distillation(lambda state, batch: (state, {}), 0)
