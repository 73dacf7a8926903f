"""The router's choice against NumPy, and its kernel, interpreted on the CPU, against the jnp form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from benchmarks.kernels.top_k_gating import SHAPES, Shape, with_tag
from kernels_pallas.dispatch import Unsupported, check_name
from kernels_pallas.top_k_gating import Gating, api, reference, top_k_gating, tpu
from tests.kernels_pallas.support import H100, lowered_for, named

SMALL = with_tag("test")
BY_NAME = {shape.name: shape for shape in SHAPES}


def slow(logits, used, k, normalize):
    """One token after another, in plain Python."""
    logits = np.asarray(logits, np.float64)
    tokens, num_experts = logits.shape
    used = np.ones(tokens, bool) if used is None else np.asarray(used)
    weights, experts = np.zeros((tokens, k)), np.full((tokens, k), num_experts)
    positions, sizes = np.zeros((tokens, k), int), np.zeros(num_experts, int)
    for t in np.flatnonzero(used):
        probs = np.exp(logits[t] - logits[t].max())
        probs /= probs.sum()
        for j, e in enumerate(sorted(range(num_experts), key=lambda e: (-logits[t, e], e))[:k]):
            weights[t, j], experts[t, j], positions[t, j] = probs[e], e, sizes[e]
            sizes[e] += 1
        if normalize:
            weights[t] /= weights[t].sum()
    return Gating(weights, experts, positions, sizes)


def check(found, expected):
    """Integers to the bit."""
    np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-5, atol=1e-7)
    for name in ("experts", "positions", "sizes"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
        assert getattr(found, name).dtype == jnp.int32


@named(SMALL)
@pytest.mark.parametrize("normalize", [False, True])
def test_against_numpy(shape, normalize, getkey):
    operands = jax.jit(shape.operands)(getkey())
    options = {"k": shape.k, "normalize": normalize}
    expected = slow(*operands, **options)
    check(jax.jit(functools.partial(reference.top_k_gating, **options))(*operands), expected)
    kernel = functools.partial(tpu.top_k_gating, **options, interpret=True)
    jax.block_until_ready(operands)
    check(jax.block_until_ready(jax.jit(kernel)(*operands)), expected)


def test_with_the_memories_of_a_tpu(getkey):
    """This interpreter starts memory as NaN and refuses reads out of bounds."""
    shape = BY_NAME["odd"]
    operands = jax.block_until_ready(jax.jit(shape.operands)(getkey()))
    options = {"k": shape.k, "normalize": True}
    kernel = functools.partial(tpu.top_k_gating, **options, interpret=pltpu.InterpretParams())
    check(jax.block_until_ready(jax.jit(kernel)(*operands)), slow(*operands, **options))


def test_experts_that_are_shut_out():
    """A logit of minus infinity is chosen last, and then by number; no expert is chosen twice."""
    logits = jnp.array([[-jnp.inf, 1.0, -jnp.inf, 2.0], [-jnp.inf] * 3 + [0.0]])
    kernel = functools.partial(tpu.top_k_gating, interpret=True)
    for run in (reference.top_k_gating, kernel):
        found = jax.jit(functools.partial(run, k=3, normalize=False))(logits, None)
        assert found.experts.tolist() == [[3, 1, 0], [3, 0, 1]]
        assert found.weights[1].tolist() == [1, 0, 0]
        assert found.sizes.tolist() == [2, 2, 0, 2]


@pytest.mark.parametrize("normalize", [False, True])
def test_gradient_of_the_weights(normalize, getkey):
    """Of the kernel as of the jnp form, which has finite differences as its own oracle."""
    # So far apart that a small step changes no choice.
    levels = jnp.tile(jnp.linspace(-1.0, 1.0, 9), (40, 1))
    logits = jax.random.permutation(getkey(), levels, axis=1, independent=True)
    used, g = jnp.arange(40) % 5 != 2, jax.random.normal(getkey(), (40, 3))

    def loss(logits, implementation):
        options = {"normalize": normalize, "implementation": implementation}
        return (g * top_k_gating(logits, 3, used, **options).weights).sum()

    by_name = jax.jit(jax.grad(loss), static_argnums=1)
    found = by_name(logits, "reference")
    direction = jax.random.normal(getkey(), logits.shape)
    run = jax.jit(lambda step: loss(logits + step * direction, "reference"))
    slope = (run(1e-2) - run(-1e-2)) / 2e-2
    np.testing.assert_allclose((found * direction).sum(), slope, rtol=1e-2)
    assert (np.asarray(found)[~np.asarray(used)] == 0).all()
    with pltpu.force_tpu_interpret_mode():
        np.testing.assert_allclose(by_name(logits, "tpu"), found, atol=1e-6)


def test_each_platform_gets_its_own():
    operands = BY_NAME["tiny"].abstract()
    run = lambda logits, used: top_k_gating(logits, 2, used)
    assert "@tpu_custom_call" in lowered_for("tpu", run, operands)
    for platform, kind in (("cpu", None), ("cuda", H100)):
        assert "sort" in lowered_for(platform, run, operands, kind)


def test_bad_input():
    logits = jnp.zeros((4, 3))
    with pytest.raises(ValueError, match=r"k must be from 1 to the number of experts, 3.*, got 4"):
        top_k_gating(logits, 4)
    with pytest.raises(ValueError, match="logits must be float32, got bfloat16"):
        top_k_gating(logits.astype(jnp.bfloat16), 1)
    with pytest.raises(ValueError, match=r"used must have the shape \(4,\), got \(3,\)"):
        api.check_operands(logits, 1, jnp.ones(3, bool))
    with pytest.raises(ValueError, match=r"implementation must be None or one of .*, got 'gpu'"):
        check_name("gpu", api.IMPLEMENTATIONS)
    many = Shape(name="many", tokens=8, experts=4096, k=1).abstract().logits
    with pytest.raises(Unsupported, match="a tile of 4096 experts has no room"):
        jax.eval_shape(functools.partial(top_k_gating, k=1, implementation="tpu"), many)
