"""The divergence of a student from its teacher, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import kl_divergence
from kernels_pallas.kl_divergence.api import check_operands

TOKENS, VOCAB = 600, 40


def operands():
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return (
        make(TOKENS, 6),
        make(VOCAB, 6),
        make(TOKENS, 9),
        make(VOCAB, 9),
        make(VOCAB),
        make(VOCAB),
    )


def slow(x, w, teacher_x, teacher_w, bias, teacher_bias, weights, temperature):
    softmax = lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    own, other = (
        softmax((x @ w.T + bias) / temperature),
        softmax((teacher_x @ teacher_w.T + teacher_bias) / temperature),
    )
    each = (other * (np.log(other) - np.log(own))).sum(-1)
    d_logits = weights[:, None] * (own - other) / temperature
    return (weights * each).sum(), d_logits @ w, d_logits.T @ x, d_logits.sum(0)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_against_numpy(implementation, temperature):
    x, w, teacher_x, teacher_w, bias, teacher_bias = operands()
    weights = jnp.asarray(np.random.default_rng(1).random(TOKENS), jnp.float32)

    def loss(x, w, bias, teacher_x):
        options = {"bias": bias, "teacher_bias": teacher_bias, "weights": weights}
        return kl_divergence(
            x,
            w,
            teacher_x,
            teacher_w,
            temperature=temperature,
            implementation=implementation,
            **options,
        )

    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(x, w, bias, teacher_x)
    given = [
        np.asarray(a, np.float64) for a in (x, w, teacher_x, teacher_w, bias, teacher_bias, weights)
    ]
    expected, *gradients = slow(*given, temperature)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(grads[:3], gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)
    np.testing.assert_array_equal(grads[3], 0)  # the teacher's


def test_whole_logits_are_never_held():
    x, w, teacher_x, teacher_w, _, _ = operands()
    text = jax.jit(jax.grad(kl_divergence)).lower(x, w, teacher_x, teacher_w).as_text()
    assert f"{TOKENS}x{VOCAB}xf32" not in text
    assert f"200x{VOCAB}xf32" in text


def test_a_token_that_the_teacher_excludes_counts_for_nothing():
    x, w, teacher_x, teacher_w, _, teacher_bias = operands()
    less = lambda bias: jax.jit(
        jax.value_and_grad(lambda x: kl_divergence(x, w, teacher_x, teacher_w, teacher_bias=bias))
    )(x)
    value, gradient = less(teacher_bias.at[3].set(-jnp.inf))
    expected, other = less(teacher_bias.at[3].set(-1e9))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, other, rtol=1e-6)


def test_bad_input():
    x, w, teacher_x, teacher_w, _, _ = operands()
    with pytest.raises(ValueError, match="the teacher's vocabulary of 39, got one of 40"):
        check_operands(x, w, teacher_x, teacher_w[:39])
    with pytest.raises(ValueError, match="the teacher's 599 tokens, got 600"):
        check_operands(x, w, teacher_x[:599], teacher_w)
    with pytest.raises(
        ValueError, match=r"the teacher's hidden states .* must have the same width, got"
    ):
        check_operands(x, w, teacher_x, teacher_w[:, :8])
    with pytest.raises(ValueError, match=r"temperature must be above 0 and finite, got 0\.0"):
        kl_divergence(x, w, teacher_x, teacher_w, temperature=0.0)
