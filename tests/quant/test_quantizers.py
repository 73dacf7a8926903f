"""Quantizers against NumPy, the papers' numbers, and the laws that hold for any input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from effscale.quant import Format, fake_quantize, quantize
from effscale.quant.quantizers import scale_shape

GOLDEN = np.array([[-1.0, -0.5, 0.0, 0.25, 0.9, 1.0]], np.float32)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bits": 4}, [-1, -0.5, 0, 0.25, 0.875, 0.875]),
        ({"bits": 4, "symmetric": False}, [-1, -0.5, 0, 0.25, 0.875, 0.875]),
        ({"bits": 8}, [-1, -0.5, 0, 0.25, 0.8984375, 0.9921875]),
        ({"bits": 2}, [-0.85, -0.85, 0, 0, 0.85, 0.85]),
        # A zero in one bit becomes plus the scale, as it must; DeepSpeed simulates a third value.
        ({"bits": 1}, np.array([-1, -1, 1, 1, 1, 1]) * 3.65 / 6),
    ],
)
def test_the_originals_numbers(options, expected):
    format = Format(granularity="token", spread="paper", **options)
    np.testing.assert_allclose(
        quantize(jnp.asarray(GOLDEN), format).values()[0], expected, rtol=1e-6, atol=1e-7
    )


def reference(x, format):
    """One group in float64, from the formulas; and the distance between two codes."""
    x, b, m = x.astype(np.float64), format.bits, np.abs(x).max()
    if format.kind == "binary":
        return np.where(x < 0, -1, 1) * np.abs(x).mean(), None
    if format.kind == "ternary":
        large = np.abs(x) > 0.7 * np.abs(x).mean()
        return np.sign(x) * large * np.abs(x)[large].mean(), None
    half = 2 ** (b - 1)
    if format.symmetric:
        s = m / {"paper": half, "narrow": half - 1, "centered": half - 0.5}[format.spread]
        least = 1 - half if format.spread == "narrow" else -half
        return s * np.clip(np.round(x / s), least, half - 1), s
    s = (x.max() - x.min()) / (2**b if format.spread == "paper" else 2**b - 1)
    z = np.round(x.min() / s) * s if format.integer_zero else x.min()
    return s * np.clip(np.round((x - z) / s), 0, 2**b - 1) + z, s


FORMATS = [
    *(Format(bits=b, spread=spread) for b in (8, 4, 3) for spread in ("paper", "narrow", "centered")),
    *(Format(bits=b, symmetric=False, spread=s) for b in (8, 4, 3) for s in ("paper", "narrow")),
    Format(bits=4, symmetric=False, integer_zero=False),
    Format(bits=2),
    Format(bits=1),
]  # fmt: skip


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f"{f.kind}-{f.symmetric}-{f.spread}")
def test_numpy_agrees(format):
    x = np.random.default_rng(0).normal(0.1, 1, (64, 8)).astype(np.float32)
    found = np.asarray(quantize(jnp.asarray(x), format).values())
    for i in range(8):
        expected, step = reference(x[:, i], format)
        # In float32 a number in the middle between two codes may go either way.
        off = np.abs(found[:, i] - expected) > 1e-5
        assert off.sum() <= 1
        if step is not None:
            assert np.abs(found[:, i] - expected).max() <= step * 1.001


@pytest.mark.parametrize(
    ("options", "shape", "groups"),
    [
        ({"granularity": "tensor"}, (3,), lambda x: [x[k] for k in range(3)]),
        ({"granularity": "channel"}, (3, 6), lambda x: [x[k, :, o] for k in range(3) for o in range(6)]),
        (
            {"granularity": "group", "group_size": 4},
            (3, 2, 6),
            lambda x: [x[k, 4 * g : 4 * g + 4, o] for k in range(3) for g in range(2) for o in range(6)],
        ),
        (
            {"granularity": "block", "num_blocks": 2},
            (3, 2),
            lambda x: [x[k, :, 3 * g : 3 * g + 3] for k in range(3) for g in range(2)],
        ),
        ({"granularity": "token"}, (3, 8), lambda x: [x[k, i] for k in range(3) for i in range(8)]),
    ],
    ids=lambda x: x["granularity"] if isinstance(x, dict) else "",
)  # fmt: skip
def test_which_numbers_share_a_scale(options, shape, groups):
    format = Format(bits=8, **options)
    x = np.random.default_rng(1).normal(size=(3, 8, 6)).astype(np.float32)
    found = quantize(jnp.asarray(x), format)
    assert found.scale.shape == shape == scale_shape(x.shape, format)
    expected = [np.abs(group).max() / 127 for group in groups(x)]
    np.testing.assert_allclose(np.ravel(found.scale), expected, rtol=1e-6)
    for group, values, scale in zip(
        groups(x), groups(np.asarray(found.values())), expected, strict=True
    ):
        assert np.abs(group - values).max() <= scale * 0.501


numbers = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=True)
matrices = hnp.arrays(np.float32, (4, 3), elements=numbers)


@given(matrices, st.sampled_from(FORMATS))
def test_laws(x, format):
    """Whatever the numbers: finite, within the range of its group, and a second time nothing changes any more."""
    found = quantize(jnp.asarray(x), format)
    values = np.asarray(found.values())
    assert np.isfinite(values).all()
    largest = np.abs(x).max(axis=0)
    # A zero point that is a multiple of the scale may lie half a step off.
    assert (np.abs(values) <= largest * (1 + 2 / (2**format.bits - 1)) + 1e-37).all()
    np.testing.assert_array_equal(values[:, largest == 0], 0.0)
    if not format.symmetric:
        equal = (x == x[:1]).all(axis=0)
        np.testing.assert_array_equal(values[:, equal], x[:, equal])
    if format.bits == 1 or (format.symmetric and format.spread == "narrow"):
        again = quantize(jnp.asarray(values), format).values()
        np.testing.assert_allclose(again, values, rtol=1e-5, atol=1e-37)


def test_what_is_not_a_number_is_not_lost():
    for format in FORMATS:
        for bad in (np.nan, np.inf):
            x = np.ones((4, 2), np.float32)
            x[1, 0] = bad
            values = np.asarray(quantize(jnp.asarray(x), format).values())
            assert not np.isfinite(values[:, 0]).all(), format
            assert np.isfinite(values[:, 1]).all()


def test_stochastic_rounding_is_right_on_average():
    x = jnp.tile(jnp.array([[0.3], [-0.6], [1.0]]), (1, 20_000))
    format = Format(bits=3, granularity="tensor")
    values = quantize(x, format, key=jax.random.key(0)).values()
    np.testing.assert_allclose(values.mean(axis=1), [0.3, -0.6, 1.0], atol=0.006)
    assert {len(np.unique(row)) for row in values} == {1, 2}


def test_the_gradient_passes_through():
    x = jnp.asarray(GOLDEN)
    for bits in (1, 2, 4, 8):
        format = Format(bits=bits, granularity="token", spread="paper")
        value, gradient = jax.value_and_grad(
            lambda x, f=format: (fake_quantize(x, f)[0] * jnp.arange(6.0)).sum()
        )(x)
        np.testing.assert_array_equal(gradient[0], np.arange(6.0))
        np.testing.assert_allclose(value, (quantize(x, format).values() [0] * jnp.arange(6.0)).sum(), rtol=1e-6)  # fmt: skip
    assert fake_quantize(x.astype(jnp.bfloat16), format).dtype == jnp.bfloat16


def test_float8_keeps_small_numbers_apart():
    """Integers of 8 bits take numbers below half a step for zero; a floating format keeps their sign and size."""
    x = jnp.array([[448.0, 0.5, -0.0625]])
    values = quantize(x, Format(floating=True, granularity="token")).values()
    np.testing.assert_array_equal(values, x)
    assert not quantize(x, Format(granularity="token")).values()[0, 1:].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, r"Format\.bits must be one of 1, 2, 3, 4, 8, got 5"),
        ({"bits": 1, "symmetric": False}, "symmetric must be True for binary, got False"),
        ({"bits": 4, "floating": True}, "floating must be False for less than 8 bits, got True"),
        (
            {"granularity": "group"},
            "group_size must be at least 1 with granularity='group', got None",
        ),
        ({"group_size": 32}, "group_size must be None unless granularity='group', got 32"),
        (
            {"granularity": "block", "num_blocks": 0},
            "num_blocks must be at least 1, or None, got 0",
        ),
    ],
)
def test_formats_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Format(**options)


def test_formats_that_do_not_fit():
    x = jnp.ones((48, 10))
    with pytest.raises(
        ValueError,
        match=r"\(48, 10\) cannot be quantized to int4.*groups of 32: 32 does not divide 48 inputs",
    ):
        quantize(x, Format(bits=4, granularity="group", group_size=32))
    with pytest.raises(ValueError, match="4 does not divide 10 outputs"):
        quantize(x, Format(granularity="block", num_blocks=4))
    with pytest.raises(ValueError, match="two dimensions"):
        quantize(x[0], Format())
    with pytest.raises(ValueError, match="binary codes are not rounded"):
        quantize(x, Format(bits=1), key=jax.random.key(0))


def test_jit_vmap_and_scan():
    """Codes and scales are a pytree whose layers can be taken off."""
    x = np.random.default_rng(2).normal(size=(3, 8, 4)).astype(np.float32)
    format = Format(bits=4, granularity="group", group_size=4)
    one = lambda x: quantize(x, format)
    whole = jax.jit(one)(x)  # compiled like the other: op by op, rounding differs
    layers = jax.jit(jax.vmap(one))(x)
    jax.tree.map(np.testing.assert_array_equal, whole, layers)
    _, values = jax.lax.scan(lambda c, layer: (c, layer.values()), 0, whole)
    np.testing.assert_array_equal(values, whole.values())
    assert dataclasses.replace(whole).format == format
