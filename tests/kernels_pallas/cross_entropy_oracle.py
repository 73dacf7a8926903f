"""The loss and its gradients in float64 NumPy, from the formulas, and comparisons with them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Oracle(NamedTuple):
    loss: float
    hidden: np.ndarray
    vocab_weight: np.ndarray
    bias: np.ndarray
    weights: np.ndarray


def oracle(operands, z_loss=0.0, with_bias=True) -> Oracle:
    """What `cross_entropy` should return, given the operands as their types hold them."""
    hidden, weight, bias, labels, weights = (
        np.asarray(x, np.int64 if x.dtype == jnp.int32 else np.float64) for x in operands
    )
    # The op casts the weight to the type of `hidden` by its contract.
    weight = np.asarray(operands.vocab_weight.astype(operands.hidden.dtype), np.float64)
    logits = hidden @ weight.T + (bias if with_bias else 0.0)
    gradient, losses = np.zeros_like(logits), np.zeros(len(labels))
    for t, (row, label) in enumerate(zip(logits, labels, strict=True)):
        if not 0 <= label < len(weight):
            continue
        normalizer = row.max() + np.log(np.exp(row - row.max()).sum())
        losses[t] = normalizer - row[label] + z_loss * normalizer**2
        gradient[t] = np.exp(row - normalizer) * (1 + 2 * z_loss * normalizer)
        gradient[t, label] -= 1
        gradient[t] *= weights[t]
    return Oracle(
        (weights * losses).sum(), gradient @ weight, gradient.T @ hidden, gradient.sum(0), losses
    )


def run(function, operands, with_bias=True):
    """Loss and gradients of `function(hidden, vocab_weight, bias, labels, weights)`."""
    hidden, weight, bias, labels, weights = operands
    which = (0, 1, 2, 4) if with_bias else (0, 1, 4)
    loss, gradients = jax.jit(jax.value_and_grad(function, which))(
        hidden, weight, bias if with_bias else None, labels, weights
    )
    gradients = list(gradients)
    if not with_bias:
        gradients.insert(2, None)
    return Oracle(loss, *gradients)


def assert_close(found, expected: Oracle, dtype) -> None:
    """Each array within a tolerance of its largest entry, each hidden gradient of its length.

    The second is the sharper one: some tokens are predicted with confidence, and their gradient is
    thousands of times smaller. It is allowed the rounding of float32 beside, in which the softmax
    is computed for every type.
    """
    tolerance = 3e-6 if dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(found.loss, expected.loss, rtol=2e-6)
    for name in ("hidden", "vocab_weight", "bias", "weights"):
        value = getattr(found, name)
        if value is None:
            continue
        value, target = np.asarray(value, np.float64), getattr(expected, name)
        assert value.shape == target.shape
        scale = np.abs(target).max()
        np.testing.assert_allclose(value, target, rtol=0, atol=tolerance * scale, err_msg=name)
    error = np.asarray(found.hidden, np.float64) - expected.hidden
    lengths = np.linalg.norm(expected.hidden, axis=1)
    bound = 5 * tolerance * lengths + 3e-6 * lengths.max()
    assert (np.linalg.norm(error, axis=1) <= bound).all()
