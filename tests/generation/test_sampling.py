"""The filters and draws of sampling, against NumPy and against frequencies."""

import dataclasses
import math
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effscale.generation import SamplingConfig
from effscale.generation.processors import keep_top_k, keep_top_p, penalize
from effscale.generation.sampling import choose

LOGITS = np.array([[1.0, 3.0, 2.0, -1.0, 0.0], [0.5, 0.4, 0.3, 0.2, 4.0]], np.float32)


def unchecked(**given):
    """What a user meets, for whom no type checker stands before a config's own checks."""
    config = object.__new__(SamplingConfig)
    for field in dataclasses.fields(SamplingConfig):
        object.__setattr__(config, field.name, given.get(field.name, field.default))
    config.__post_init__()
    return config


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


@pytest.mark.parametrize("levels", [1, 3, 1000], ids=["uniform", "many ties", "no ties"])
def test_top_p_keeps_what_transformers_keeps(levels):
    torch = pytest.importorskip("torch", reason="the oracle is transformers")
    from transformers import TopPLogitsWarper

    logits = np.random.default_rng(levels).permutation(40)[:10].reshape(1, 10) % levels / 8
    logits = np.concatenate([logits, logits[:, ::-1]]).astype(np.float32)
    for p in (0.05, 0.33, 0.5, 0.77, 0.999):
        wanted = TopPLogitsWarper(p)(None, torch.tensor(logits)).numpy()
        np.testing.assert_array_equal(keep_top_p(jnp.asarray(logits), p), wanted, err_msg=f"p={p}")
        if levels == 1:
            assert (
                np.isfinite(wanted).sum(1).tolist()
                == [{0.05: 1, 0.33: 4, 0.5: 5, 0.77: 8}.get(p, 10)] * 2
            )


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
        ("top_k", -1),
        ("top_p", 0.0),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("min_new_tokens", -1),
        ("min_new_tokens", 129),
        ("no_repeat_ngram_size", -1),
        ("no_repeat_ngram_size", 1.5),
        ("num_return_sequences", 0),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: math.inf}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", ((1, 2.0), (1, 3.0))),
        ("logit_bias", 3),
        ("top_p", 1.5),
        ("repetition_penalty", 0.0),
        ("pad_token_id", -1),
        ("top_k", 2.5),
        ("top_k", True),
        ("max_new_tokens", 8.0),
        ("pad_token_id", None),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 1e-9),
        ("temperature", "hot"),
        ("repetition_penalty", math.inf),
        ("stop_token_ids", 1.5),
        ("stop_token_ids", (1, 2.5)),
        ("stop_token_ids", [[1], [2, 3]]),
        ("stop_token_ids", "eos"),
    ],
)
def test_impossible_values_name_the_field(field, value):
    with pytest.raises(
        ValueError, match=rf"SamplingConfig\.{field} must be .*, got {re.escape(repr(value))}"
    ):
        unchecked(**{field: value})


def test_one_likeliest_answer_is_all_there_is():
    with pytest.raises(
        ValueError, match=r"num_return_sequences must be 1 with greedy decoding.*, got 2"
    ):
        SamplingConfig(temperature=0.0, num_return_sequences=2)


def test_options_that_are_off_make_no_other_program():
    off = unchecked(top_k=0, min_p=0, logit_bias={}, no_repeat_ngram_size=0, min_new_tokens=0)
    assert off == SamplingConfig()
    given = unchecked(logit_bias={np.int64(5): 2, 3: -math.inf})
    assert given.logit_bias == ((3, -math.inf), (5, 2.0))
    assert hash(given) == hash(dataclasses.replace(given, logit_bias={3: -math.inf, 5: 2.0}))


@pytest.mark.parametrize("given", [3, np.int64(3), [3], (3,), np.array([3])], ids=repr)
def test_stop_ids_may_be_one_id_or_any_list_of_them(given):
    config = unchecked(stop_token_ids=given, top_k=np.int32(4), temperature=np.float64(0.5))
    assert config == SamplingConfig(stop_token_ids=(3,), top_k=4, temperature=0.5)
    assert hash(config) == hash(SamplingConfig(stop_token_ids=(3,), top_k=4, temperature=0.5))
    assert type(config.temperature) is float
