"""Experts that choose their tokens: against NumPy, on eight devices, and where it cannot work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from effscale.generation import SamplingConfig, decode
from effscale.models import MLPConfig, Transformer, gpt2
from effscale.models.context import build_context
from effscale.moe import MoEConfig, RouterConfig, with_experts
from effscale.moe.routing import expert_choice
from effscale.parallel import MeshConfig, shard, shard_batch

D, E = 8, 4
ROUTER = RouterConfig(k=2, chosen_by="experts", eval_capacity_factor=0.25, min_capacity=0)
REAL = np.arange(6)[None] >= np.array([[0], [2]])
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, D)), jnp.float32)


def make(**changes):
    config = MoEConfig(num_experts=E, expert=MLPConfig(d_ff=12), router=ROUTER, **changes)
    return jax.jit(lambda: config.build(D, std=0.5, out_std=0.5, rngs=nnx.Rngs(0)))()


def run(layer, x):
    context = build_context(6, kind=None, head_dim=4, causal=False, valid=jnp.asarray(REAL))
    return layer(x, context)


def slow(layer, x):
    """Each expert sorts the real tokens by its column of the probabilities and takes the first 2 (0.25 * 2 * 12 / 4, rounded up)."""
    rows, real = np.asarray(x).reshape(-1, D), REAL.reshape(-1)
    logits = rows @ np.asarray(layer.router.logits.kernel.get_value())
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    y, counts = np.zeros_like(rows), np.zeros(len(rows), int)
    for e in range(E):
        up = rows @ np.asarray(layer.experts.up.kernel.get_value()[e])
        made = jax.nn.gelu(up + np.asarray(layer.experts.up.bias.get_value()[e])[None])
        made = np.asarray(made) @ np.asarray(layer.experts.down.kernel.get_value()[e])
        made = made + np.asarray(layer.experts.down.bias.get_value()[e])
        order = [t for t in np.argsort(-probs[:, e], kind="stable") if real[t]]
        for t in order[:2]:
            y[t] += probs[t, e] * made[t]
            counts[t] += 1
    return y.reshape(x.shape), counts


def test_against_numpy():
    layer = make()
    y, report = jax.jit(run)(layer, X)
    expected, counts = slow(layer, X)
    np.testing.assert_allclose(y, expected, atol=2e-5)
    np.testing.assert_allclose(report["load"], np.full(E, 1 / E), rtol=1e-6)
    left = (counts[REAL.reshape(-1)] == 0).mean()
    assert 0 < left < 1
    np.testing.assert_allclose(report["dropped"], left, rtol=1e-6)
    np.testing.assert_array_equal(y[~REAL], 0)
    other = jax.jit(run)(layer, jnp.where(REAL[..., None], X, 7.0))
    np.testing.assert_allclose(other[0][REAL], y[REAL], rtol=1e-5)


def test_the_router_learns_through_the_weights():
    grads = jax.jit(jax.grad(lambda layer: jnp.square(run(layer, X)[0]).sum()))(make())
    assert np.abs(grads.router.logits.kernel.get_value()).max() > 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(0, 9))
def test_laws(seed, capacity, padding):
    rng = np.random.default_rng(seed)
    probs = rng.random((9, 3)).astype(np.float32)
    used = rng.permutation(9) >= padding
    choice = expert_choice(jnp.asarray(probs), capacity, used=jnp.asarray(used))
    for e in range(3):
        tokens, weights = np.asarray(choice.tokens[e]), np.asarray(choice.weights[e])
        taken = tokens[tokens < 9]
        assert len(taken) == len(set(taken)) == choice.sizes[e] == min(capacity, used.sum())
        assert used[taken].all()
        np.testing.assert_array_equal(weights[: len(taken)], probs[taken, e])
        np.testing.assert_array_equal(weights[len(taken) :], 0)
        left = used.copy()
        left[taken] = False
        assert not left.any() or probs[left, e].max() <= probs[taken, e].min()


def test_gradients_on_eight_devices():
    dense = gpt2(num_layers=2, d_model=D, num_heads=2, vocab_size=23, max_length=16)
    router = RouterConfig(k=2, chosen_by="experts")
    moe = MoEConfig(num_experts=8, expert=MLPConfig(d_ff=12), router=router, groups=8)
    model = jax.jit(lambda: Transformer(with_experts(dense, moe), rngs=nnx.Rngs(0)))()
    ids = np.random.default_rng(0).integers(0, 23, (8, 16)).astype(np.int32)
    loss = lambda model, ids: jnp.square(model(ids)).mean()
    expected = jax.jit(jax.grad(loss))(model, ids)
    mesh = MeshConfig(data=2, expert=4).build()
    with jax.set_mesh(mesh):
        placed = shard_batch({"ids": ids}, mesh)["ids"]
        found = jax.jit(jax.grad(loss))(shard(model, mesh), placed)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_bad_input():
    with pytest.raises(
        ValueError, match="capacity must be from 1 to the number of tokens, 9, got 10"
    ):
        expert_choice(jnp.ones((9, 3)), 10)
    for given_, named in (
        ({"capacity_factor": None}, "capacity_factor"),
        ({"priority": "token"}, "priority"),
        ({"noise": "gumbel"}, "noise"),
        ({"balance_by_bias": True}, "balance_by_bias"),
    ):
        with pytest.raises(ValueError, match=named):
            RouterConfig(chosen_by="experts", **given_)
    with pytest.raises(ValueError, match="dispatch"):
        make(dispatch="one_hot")
    dense = gpt2(num_layers=2, d_model=D, num_heads=2, vocab_size=23, max_length=16)
    moe = MoEConfig(num_experts=E, expert=MLPConfig(d_ff=12), router=ROUTER)
    model = jax.jit(lambda: Transformer(with_experts(dense, moe), rngs=nnx.Rngs(0)))()
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode(
            model, jnp.zeros((1, 4), jnp.int32), SamplingConfig(max_new_tokens=2, temperature=0.0)
        )
