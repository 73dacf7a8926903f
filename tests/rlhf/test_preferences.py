"""Losses of pairs: DeepSpeed-Chat's golden vectors, and NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from effscale.rlhf import dpo_loss, pairwise_loss, token_pairwise_loss
from effscale.rlhf.preferences import diverging, pairwise_accuracy

CHOSEN, REJECTED = [5, 6, 7, 9, 2, 0, 0, 0], [5, 6, 3, 4, 8, 1, 0, 0]


def deepspeed(chosen, rejected, lengths):
    ids = [jnp.asarray([row], jnp.int32) for row in (chosen, rejected)]
    scores = [row.astype(jnp.float32) ** 1.5 / 10 for row in ids]
    where = diverging(*ids, *(jnp.asarray([n], jnp.int32) for n in lengths))
    ends = [score[0, n - 1] for score, n in zip(scores, lengths, strict=True)]
    return token_pairwise_loss(*scores, where), ends


@pytest.mark.parametrize(
    ("chosen", "rejected", "lengths", "loss", "ends"),
    [
        (CHOSEN, REJECTED, (5, 6), 0.8067957, (0.2828427, 0.1)),
        (CHOSEN, CHOSEN, (5, 5), 0.6931472, (0.2828427, 0.2828427)),
        # A row that begins with a padding token, as OPT's do.
        ([0, *CHOSEN[:-1]], [0, 5, 6, 3, 4, 8, 1, 2], (6, 8), 0.8143436, (0.2828427, 0.2828427)),
    ],
)
def test_deepspeed_chat(chosen, rejected, lengths, loss, ends):
    found, found_ends = deepspeed(chosen, rejected, lengths)
    np.testing.assert_allclose(found, loss, rtol=1e-6)
    np.testing.assert_allclose(found_ends, ends, rtol=1e-6)


def test_scores_of_whole_responses():
    chosen, rejected = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.0, 1.0, 0.5])
    margin = jnp.array([0.5, 0.0, 1.0])
    found = pairwise_loss(chosen, rejected, margin=margin, center=0.01)
    pairs = zip(np.asarray(chosen), np.asarray(rejected), np.asarray(margin), strict=True)
    expected = [np.log1p(np.exp(-(c - r - m))) + 0.01 * (c + r) ** 2 for c, r, m in pairs]
    np.testing.assert_allclose(found, np.mean(expected), rtol=1e-6)
    np.testing.assert_allclose(pairwise_accuracy(chosen, rejected), 1 / 3, rtol=1e-6)
    assert np.isfinite(pairwise_loss(jnp.array([-1e4]), jnp.array([1e4])))  # no log of 0


def test_dpo():
    rng = np.random.default_rng(0)
    c, r, ref_c, ref_r = rng.normal(size=(4, 5)).astype(np.float32) * 10
    given = (jnp.asarray(a) for a in (c, r, ref_c, ref_r))
    loss, metrics = dpo_loss(*given, beta=0.3, label_smoothing=0.1)
    z = 0.3 * ((c - ref_c) - (r - ref_r))
    sigma = lambda x: 1 / (1 + np.exp(-x))
    expected = -(0.9 * np.log(sigma(z)) + 0.1 * np.log(sigma(-z))).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], (z > 0).mean())
    np.testing.assert_allclose(metrics["margin"], z.mean(), rtol=1e-5)
    with pytest.raises(ValueError, match=r"label_smoothing must be .* got 0\.5"):
        dpo_loss(*(jnp.zeros(1),) * 4, label_smoothing=0.5)


def test_bad_input():
    ones = jnp.ones(2)
    with pytest.raises(ValueError, match=r"beta must be above 0, got -1\.0"):
        dpo_loss(ones, ones, ones, ones, beta=-1.0)
    with pytest.raises(ValueError, match=r"center must be at least 0, got -1\.0"):
        pairwise_loss(ones, ones, center=-1.0)
