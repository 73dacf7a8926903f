"""Routing: the golden vectors of DeepSpeed's gates, and the laws of any assignment."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effscale.moe import expert_capacity, load_balance, top_k_routing, z_loss

LOGITS = jnp.array(
    [[2, 1, 0], [1.5, 1, 0.5], [3, 0, 1], [0, 2, 1], [2.2, 2, -1], [0, 1, 2.5]], jnp.float32
)
PROBS = jax.nn.softmax(LOGITS)


def slots(routing):
    return np.where(routing.kept, routing.positions, -1)


def test_one_expert_first_come_first_served():
    routing = top_k_routing(PROBS, capacity=expert_capacity(6, 3, 1.0, min_capacity=0))
    assert routing.capacity == 2
    np.testing.assert_array_equal(routing.experts[:, 0], [0, 0, 0, 1, 0, 2])
    np.testing.assert_array_equal(slots(routing)[:, 0], [0, 1, -1, 0, -1, 0])
    np.testing.assert_allclose(
        routing.weights[:, 0], [0.66524, 0.50648, 0, 0.66524, 0, 0.76616], atol=1e-5
    )
    np.testing.assert_allclose(load_balance(PROBS, routing.experts), 1.1765544, rtol=1e-6)
    np.testing.assert_array_equal(routing.sizes, [4, 1, 1])  # before drops


def test_two_experts_first_choices_go_first():
    routing = top_k_routing(PROBS, 2, capacity=expert_capacity(6, 3, 1.0, k=2))
    assert routing.capacity == 4
    np.testing.assert_array_equal(routing.experts[:, 1], [1, 1, 2, 2, 1, 1])
    np.testing.assert_array_equal(slots(routing), [[0, 1], [1, 2], [2, 1], [0, 2], [3, 3], [0, -1]])
    np.testing.assert_allclose(
        routing.weights[:, 0], [0.73106, 0.62246, 0.8808, 0.73106, 0.54983, 1], atol=1e-5
    )
    np.testing.assert_allclose(routing.weights.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(load_balance(PROBS, routing.experts[:, :1]), 1.1765544, rtol=1e-6)


def test_two_experts_with_less_room():
    capacity = expert_capacity(6, 3, 0.75, k=2, min_capacity=0)
    routing = top_k_routing(PROBS, 2, capacity=capacity)
    assert capacity == 3
    np.testing.assert_array_equal(routing.kept[4:], [[False, False], [True, False]])
    np.testing.assert_array_equal(routing.weights[4], [0, 0])


def test_by_probability_a_negative_logit_is_no_reason_to_be_dropped():
    """DeepSpeed compared logits with the zeros of tokens that had not chosen the expert, and dropped all that were below."""
    probs = jax.nn.softmax(LOGITS - 10)
    routing = top_k_routing(probs, 3, capacity=2)
    np.testing.assert_array_equal(routing.kept.sum(0).sum(), 6)
    order = np.argsort(-np.asarray(probs), axis=0)
    for expert in range(3):
        took = np.where(((routing.experts == expert) & routing.kept).any(1))[0]
        assert set(took) == set(order[:2, expert])


def test_the_balance_of_all_choices_is_divided_by_k():
    experts = jax.lax.top_k(LOGITS, 2)[1]
    counts = np.bincount(np.asarray(experts).reshape(-1), minlength=3) / 6
    expected = 3 * (counts * np.asarray(PROBS).mean(0)).sum() / 2
    np.testing.assert_allclose(load_balance(PROBS, experts), expected, rtol=1e-6)


def test_random_selection_prefers_nobody():
    """Each of the four tokens that want expert 0 gets one of its two places in half of the draws."""
    keys = jax.random.split(jax.random.key(0), 400)
    kept = jax.vmap(lambda key: top_k_routing(PROBS, capacity=2, key=key).kept[:, 0])(keys)
    np.testing.assert_allclose(kept.mean(0), [0.5, 0.5, 0.5, 1, 0.5, 1], atol=0.1)
    assert (kept.sum(1) == 4).all()


@pytest.mark.parametrize("priority", ["token", "choice", "probability", "random"])
@hypothesis.settings(deadline=None, max_examples=15)
@hypothesis.given(
    seed=st.integers(0, 10_000), k=st.integers(1, 4), capacity=st.none() | st.integers(1, 9)
)
def test_laws(priority, seed, k, capacity):
    """Each item once, in the place it is said to have; never more than the capacity; nobody dropped while there is room."""
    rng = np.random.default_rng(seed)
    probs = jax.nn.softmax(jnp.asarray(rng.normal(size=(9, 5)), jnp.float32))
    used = jnp.asarray(rng.random(9) < 0.8)
    routing = _route(probs, used, jax.random.key(seed), k=k, capacity=capacity, priority=priority)
    experts, kept = np.asarray(routing.experts), np.asarray(routing.kept)
    assert (experts[~np.asarray(used)] == 5).all()
    assert not kept[~np.asarray(used)].any()
    np.testing.assert_array_equal(np.sort(routing.order), np.arange(9 * k))
    room = 9 if capacity is None else capacity
    for expert in range(5):
        mine = experts == expert
        assert mine.sum() == routing.sizes[expert]
        assert mine.sum(1).max() <= 1
        places = np.asarray(routing.positions)[mine & kept]
        np.testing.assert_array_equal(np.sort(places), np.arange(min(mine.sum(), room)))
        start = int(routing.starts[expert])
        ranked = np.asarray(routing.order)[start : start + mine.sum()]
        np.testing.assert_array_equal(experts.reshape(-1)[ranked], expert)
        np.testing.assert_array_equal(
            np.asarray(routing.positions).reshape(-1)[ranked], np.arange(mine.sum())
        )
        if priority == "probability":
            sent = np.take_along_axis(np.asarray(probs), np.minimum(experts, 4), 1)
            assert (np.diff(sent.reshape(-1)[ranked]) <= 0).all()
    assert (np.asarray(routing.weights)[~kept] == 0).all()


_route = jax.jit(
    lambda probs, used, key, k, capacity, priority: top_k_routing(
        probs, k, capacity=capacity, used=used, priority=priority, key=key
    ),
    static_argnames=("k", "capacity", "priority"),
)


def test_weights_carry_the_gradient_and_choices_none():
    """In NumPy: of the kept, normalized weights."""
    pick = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)), jnp.float32)
    found = jax.grad(lambda p: (top_k_routing(p, 2, capacity=3).weights * pick).sum())(PROBS)
    routing = top_k_routing(PROBS, 2, capacity=3)
    expected = np.zeros((6, 3))
    for token in range(6):
        chosen = [(c, int(routing.experts[token, c])) for c in range(2) if routing.kept[token, c]]
        total = sum(float(PROBS[token, e]) for _, e in chosen)
        for c, e in chosen:
            for c2, e2 in chosen:
                own = total if c == c2 else 0.0
                expected[token, e2] += pick[token, c] * (own - float(PROBS[token, e])) / total**2
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "k", "least", "expected"),
    [(6, 3, 0.75, 2, 0, 3), (100, 8, 1.25, 1, 4, 16), (10, 64, 1.0, 1, 4, 4), (3, 2, 4.0, 2, 4, 3)],
)
def test_capacity(tokens, experts, factor, k, least, expected):
    assert expert_capacity(tokens, experts, factor, k=k, min_capacity=least) == expected


def test_z_loss():
    logits = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    expected = np.log(np.exp(logits).sum(1)) ** 2
    np.testing.assert_allclose(z_loss(jnp.asarray(logits)), expected.mean(), rtol=1e-5)
    used = jnp.array([True, True, False, True, False])
    np.testing.assert_allclose(
        z_loss(jnp.asarray(logits), used), expected[np.asarray(used)].mean(), rtol=1e-5
    )


def test_bad_input():
    with pytest.raises(ValueError, match="k=4: must be from 1 to the number of experts, 3"):
        top_k_routing(PROBS, 4)
    with pytest.raises(ValueError, match="priority='random' needs a key"):
        top_k_routing(PROBS, priority="random")
