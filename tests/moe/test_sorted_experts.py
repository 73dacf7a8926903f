"""Experts on sorted rows: buffers and the loop over what does not fit, against each expert by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effscale.models import MLPConfig
from effscale.models.context import build_context
from effscale.moe.run_experts import run_sorted
from effscale.quant import Recipe, quantize_model, w8a8

D, E, ROWS = 8, 4, 60
CONTEXT = build_context(1, kind=None, head_dim=4, causal=True)
X = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, D)), jnp.float32)


def stacked(seed=0):
    build = lambda rngs: MLPConfig(d_ff=12, activation="silu", gated=True).build(
        D, std=0.5, out_std=0.5, rngs=rngs
    )
    return jax.jit(lambda: jax.vmap(build)(nnx.Rngs(seed).split(E)))()


def run(experts, x, sizes, key=None):
    return run_sorted(experts, x, sizes, CONTEXT, key, expected_rows=ROWS)


def slow(experts, x, sizes):
    """Expert after expert, each on its rows alone."""
    made, start = [], 0
    for e, size in enumerate(sizes):
        if not size:
            continue
        expert = jax.tree.map(lambda a, e=e: a[e], experts)
        made.append(expert(x[None, start : start + size], CONTEXT, None)[0][0])
        start += size
    return jnp.concatenate([*made, jnp.zeros((x.shape[0] - start, D))])


@pytest.mark.parametrize(
    "sizes", [(15, 15, 15, 15), (0, 60, 0, 0), (1, 40, 3, 9), (0, 0, 0, 0)], ids=str
)
def test_values_and_gradients(sizes):
    """Of an even load, of all rows for one expert, with padding at the end, and of padding alone."""
    experts = stacked()
    weigh = jnp.sin(jnp.arange(X.size, dtype=jnp.float32)).reshape(X.shape)
    given = jnp.asarray(sizes, jnp.int32)
    loss = lambda function, sizes: lambda experts, x: (function(experts, x, sizes) * weigh).sum()
    found = jax.jit(jax.value_and_grad(loss(run, given), (0, 1)))(experts, X)
    expected = jax.value_and_grad(loss(slow, sizes), (0, 1))(experts, X)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    np.testing.assert_array_equal(run(experts, X, given)[sum(sizes) :], 0)


def test_quantized_experts():
    """Their rows keep scales of their own, and gradients flow to the rows."""
    rule = dataclasses.replace(w8a8().rules[0], where="kernel")
    experts = quantize_model(stacked(), Recipe((rule,)))
    sizes = (1, 40, 3, 9)
    given = jnp.asarray(sizes, jnp.int32)
    found = jax.jit(run)(experts, X, given)
    np.testing.assert_allclose(found, slow(experts, X, sizes), atol=1e-5)
    gradient = jax.jit(jax.grad(lambda x: jnp.square(run(experts, x, given)).sum()))(X)
    assert np.isfinite(gradient).all()
    assert (np.abs(gradient[: sum(sizes)]).max(1) > 0).all()
