"""Rotary frequencies for longer sequences, against transformers and by what they are meant to do."""

import dataclasses
import math
import types

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effscale.models import LinearScaling, Llama3Scaling, Rotary, YarnScaling
from effscale.models.positions import rotary_angles

LLAMA = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=8192)  # fmt: skip


def plain(dim, base):
    return base ** (-np.arange(0, dim, 2) / dim)


def theirs(scaling, dim, base):
    """Frequencies and amplitude as transformers computes them."""
    rope = pytest.importorskip(
        "transformers.modeling_rope_utils", reason="the oracle of this test is transformers"
    )
    names = {"original_max_length": "original_max_position_embeddings"}
    fields = {names.get(k, k): v for k, v in vars(scaling).items() if v is not None}
    kind = type(scaling).__name__.removesuffix("Scaling").lower()
    config = types.SimpleNamespace(
        rope_parameters={"rope_type": kind, "rope_theta": base, **fields},
        standardize_rope_params=lambda: None,
        hidden_size=dim,
        num_attention_heads=1,
        head_dim=dim,
        max_position_embeddings=131072,
    )
    frequencies, amplitude = rope.ROPE_INIT_FUNCTIONS[kind](config)
    return frequencies.numpy(), amplitude


def check(scaling, dim, base):
    expected, amplitude = theirs(scaling, dim, base)
    found = scaling.scale(plain(dim, base), base)
    np.testing.assert_allclose(found, expected, rtol=3e-6)  # theirs is in float32
    assert scaling.amplitude == pytest.approx(amplitude, rel=1e-12)


@pytest.mark.parametrize(
    "scaling",
    [
        LinearScaling(factor=4.0),
        LinearScaling(factor=1.0),
        LLAMA,
        Llama3Scaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=8192),
        Llama3Scaling(factor=2.0, low_freq_factor=0.5, high_freq_factor=9.0, original_max_length=64),
        YarnScaling(factor=16.0, original_max_length=4096),
        YarnScaling(factor=1.0, original_max_length=4096),
        YarnScaling(factor=0.5, original_max_length=4096),
        YarnScaling(factor=8.0, original_max_length=4, beta_fast=32.0),
        YarnScaling(factor=4.0, original_max_length=2048, beta_fast=16.0, beta_slow=2.0, truncate=False),
        YarnScaling(factor=4.0, original_max_length=2048, beta_fast=3.0, beta_slow=3.0, truncate=False),
        YarnScaling(factor=4.0, original_max_length=2048, attention_factor=0.7),
        YarnScaling(factor=40.0, original_max_length=4096, mscale=0.707, mscale_all_dim=1.0),
        YarnScaling(factor=40.0, original_max_length=4096, mscale=0.707),
        YarnScaling(factor=40.0, original_max_length=4096, mscale=0.0, mscale_all_dim=1.0),
    ],
)  # fmt: skip
def test_transformers_computes_the_same(scaling):
    for base in (100.0, 1e4, 5e5):
        for dim in (2, 8, 64, 128):
            check(scaling, dim, base)


@given(
    factor=st.floats(1.0, 64.0),
    length=st.integers(16, 100_000),
    low=st.floats(0.1, 8.0),
    more=st.floats(0.1, 30.0),
    base=st.floats(10.0, 1e6),
    dim=st.integers(1, 64).map(lambda pairs: 2 * pairs),
    truncate=st.booleans(),
)
def test_transformers_computes_the_same_everywhere(factor, length, low, more, base, dim, truncate):
    shared = {"factor": factor, "original_max_length": length}
    llama3 = Llama3Scaling(**shared, low_freq_factor=low, high_freq_factor=low + more)
    yarn = YarnScaling(**shared, beta_slow=low, beta_fast=low + more, truncate=truncate)
    # Their frequencies and ramps are in float32, and a ramp that is a thousandth of a pair wide enlarges its rounding without
    # limit. So theirs must be what ours gives for inputs changed by float32's rounding: of a power with its exponent,
    # log(1e6) / 2**24, and of a few products. Whole numbers, which truncated ramps begin and end at, are exact in float32.
    rounding = 1.5e-6
    before = plain(dim, base)
    shift = (
        0.0 if truncate else 2 * math.log(base) * rounding
    )  # of a ramp's ends, by a 1.5e-6 of themselves
    changed = {
        llama3: [llama3.scale(before * (1 + sign * rounding), base) for sign in (-1, 0, 1)],
        yarn: [
            dataclasses.replace(
                yarn,
                beta_slow=low * (1 + sign * shift),
                beta_fast=(low + more) * (1 + sign * shift),
            ).scale(before, base)
            for sign in (-1, 0, 1)
        ],
    }
    for scaling, found in changed.items():
        expected, amplitude = theirs(scaling, dim, base)
        assert (expected >= np.min(found, axis=0) * (1 - rounding)).all(), scaling
        assert (expected <= np.max(found, axis=0) * (1 + rounding)).all(), scaling
        assert scaling.amplitude == pytest.approx(amplitude, rel=1e-12)


GOLDEN = {
    LinearScaling(factor=4.0): (
        [0.25, 0.07905694, 0.025, 0.007905695, 0.0025, 0.0007905695, 0.00025, 7.905695e-05],
        1.0,
    ),
    Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=256): (
        [1.0, 0.3162278, 0.1, 0.006613107, 0.00125, 0.0003952847, 0.000125, 3.952847e-05],
        1.0,
    ),
    YarnScaling(
        factor=16.0,
        original_max_length=4096,
        beta_fast=32.0,
        beta_slow=1.0,
        attention_factor=None,
        mscale=None,
        mscale_all_dim=None,
        truncate=True,
    ): (
        [1.0, 0.3162278, 0.1, 0.02421119, 0.0053125, 0.0009388012, 6.25e-05, 1.976424e-05],
        1.277259,
    ),
    YarnScaling(
        factor=40.0,
        original_max_length=512,
        beta_fast=8.0,
        beta_slow=2.0,
        attention_factor=None,
        mscale=0.707,
        mscale_all_dim=1.0,
        truncate=False,
    ): (
        [1.0, 0.3162278, 0.1, 0.006426881, 0.00025, 7.905695e-05, 2.5e-05, 7.905694e-06],
        0.9210424,
    ),
}


@pytest.mark.parametrize("scaling", GOLDEN)
def test_golden(scaling):
    """Computed once by transformers 5.24 in float32, for a base of 10000 and 16 dimensions."""
    frequencies, amplitude = GOLDEN[scaling]
    np.testing.assert_allclose(scaling.scale(plain(16, 1e4), 1e4), frequencies, rtol=2e-6)
    assert scaling.amplitude == pytest.approx(amplitude, rel=1e-6)


def test_llama3_keeps_fast_pairs_and_divides_slow_ones():
    before = plain(128, 5e5)
    turns = 8192 * before / (2 * math.pi)
    ratio = LLAMA.scale(before, 5e5) / before
    assert (ratio[turns > 4] == 1).all()
    np.testing.assert_allclose(ratio[turns < 1], 1 / 8)
    between = ratio[(turns > 1) & (turns < 4)]
    assert len(between) > 3
    assert (np.diff(between) < 0).all()
    assert ((between > 1 / 8) & (between < 1)).all()


def test_yarn_keeps_fast_pairs_and_divides_slow_ones():
    yarn = YarnScaling(factor=16.0, original_max_length=4096)
    before = plain(128, 1e4)
    turns = 4096 * before / (2 * math.pi)
    ratio = yarn.scale(before, 1e4) / before
    np.testing.assert_allclose(ratio[turns > 40], 1)
    np.testing.assert_allclose(ratio[turns < 0.9], 1 / 16)
    assert (np.diff(ratio) <= 0).all()
    assert yarn.amplitude == pytest.approx(0.1 * math.log(16) + 1)


def test_angles():
    """Linear scaling is a division of positions; an amplitude scales sine and cosine and so the products' square."""
    positions = jnp.array([[0, 3, 40, 1000]])
    halved = rotary_angles(positions, 8, 1e4, LinearScaling(factor=2.0))
    for found, expected in zip(halved, rotary_angles(positions // 2, 8, 1e4), strict=True):
        np.testing.assert_allclose(found[:, [0, 2, 3]], expected[:, [0, 2, 3]], atol=1e-4)
    yarn = YarnScaling(factor=16.0, original_max_length=4096, attention_factor=1.5)
    sin, cos = rotary_angles(positions, 8, 1e4, yarn)
    np.testing.assert_allclose(sin**2 + cos**2, np.full((1, 4, 4), 1.5**2), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearScaling(factor=0.0), r"LinearScaling\.factor must be above 0.*, got 0\.0"),
        (lambda: Llama3Scaling(factor=-1.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=8), r"Llama3Scaling\.factor must be above 0, got -1\.0"),
        (lambda: Llama3Scaling(factor=2.0, low_freq_factor=0.0, high_freq_factor=4.0, original_max_length=8), r"low_freq_factor must be above 0.*, got 0\.0"),
        (lambda: Llama3Scaling(factor=2.0, low_freq_factor=4.0, high_freq_factor=4.0, original_max_length=8), r"high_freq_factor must be above low_freq_factor=4\.0.*, got 4\.0"),
        (lambda: Llama3Scaling(factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=0), r"original_max_length must be at least 1.*, got 0"),
        (lambda: YarnScaling(factor=0.0, original_max_length=8), r"YarnScaling\.factor must be above 0, got 0\.0"),
        (lambda: YarnScaling(factor=2.0, original_max_length=0), r"original_max_length must be at least 1.*, got 0"),
        (lambda: YarnScaling(factor=2.0, original_max_length=8, beta_slow=0.0), r"beta_slow must be above 0.*, got 0\.0"),
        (lambda: YarnScaling(factor=2.0, original_max_length=8, beta_slow=40.0), r"beta_fast must be at least beta_slow=40\.0.*, got 32\.0"),
        (lambda: YarnScaling(factor=2.0, original_max_length=8, attention_factor=0.0), r"attention_factor must be above 0, or None.*, got 0\.0"),
        (lambda: Rotary(base=1.0, scaling=YarnScaling(factor=2.0, original_max_length=8)), r"Rotary\.base must be above 1 with YarnScaling.*, got 1\.0"),
    ],
)  # fmt: skip
def test_impossible_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()
