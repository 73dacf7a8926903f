"""The filters and draws of sampling, against NumPy and against frequencies."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effscale.generation import SamplingConfig, choose, keep_top_k, keep_top_p, penalize

LOGITS = np.array([[1.0, 3.0, 2.0, -1.0, 0.0], [0.5, 0.4, 0.3, 0.2, 4.0]], np.float32)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_top_k_keeps_the_k_largest():
    kept = np.isfinite(keep_top_k(jnp.asarray(LOGITS), 2))
    assert kept.tolist() == [[False, True, True, False, False], [True, False, False, False, True]]
    assert np.isfinite(keep_top_k(jnp.asarray(LOGITS), 99)).all()


@hypothesis.given(st.integers(0, 1000), st.floats(0.0625, 1.0, width=32))
def test_top_p_keeps_the_fewest_tokens_that_reach_p(seed, p):
    logits = np.random.default_rng(seed).normal(size=(1, 7)).astype(np.float32) * 2
    probabilities = softmax(logits.astype(np.float64))[0]
    order = np.argsort(-probabilities)
    totals = np.cumsum(probabilities[order])
    hypothesis.assume(np.abs(totals - p).min() > 1e-5)
    wanted = set(order[: int(np.searchsorted(totals, p)) + 1].tolist()) if p < 1 else set(range(7))
    kept = set(np.flatnonzero(np.isfinite(keep_top_p(jnp.asarray(logits), p))[0]).tolist())
    assert kept == wanted


def test_the_penalty_divides_positive_logits_and_multiplies_negative_ones():
    seen = np.array([[True, True, False, True, True]] * 2)
    wanted = np.array([[0.5, 1.5, 2.0, -2.0, 0.0], [0.25, 0.2, 0.3, 0.1, 2.0]], np.float32)
    np.testing.assert_allclose(penalize(jnp.asarray(LOGITS), jnp.asarray(seen), 2.0), wanted)


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(temperature=1.0),
        SamplingConfig(temperature=0.5),
        SamplingConfig(temperature=2.0, top_k=3),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(config):
    draws = 20_000
    logits = jnp.tile(jnp.asarray(LOGITS[:1]), (draws, 1))
    tokens = np.asarray(choose(logits, config, jax.random.key(0)))
    scaled = LOGITS[0] / config.temperature
    if config.top_k is not None:
        scaled = np.where(np.argsort(np.argsort(-scaled)) < config.top_k, scaled, -np.inf)
    wanted = softmax(scaled)
    seen = np.bincount(tokens, minlength=5) / draws
    # Four standard deviations of a frequency over this many draws.
    assert (np.abs(seen - wanted) <= 4 * np.sqrt(wanted * (1 - wanted) / draws) + 1e-9).all()


@pytest.mark.parametrize("config", [SamplingConfig(temperature=0.0), SamplingConfig(top_k=1)])
def test_greedy_takes_the_largest(config):
    assert config.greedy
    assert choose(jnp.asarray(LOGITS), config, jax.random.key(0)).tolist() == [1, 4]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -1.0),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("repetition_penalty", 0.0),
        ("pad_id", -1),
    ],
)
def test_impossible_values_name_the_field(field, value):
    with pytest.raises(ValueError, match=rf"SamplingConfig\.{field}={value!r}: must be"):
        SamplingConfig(**{field: value})
