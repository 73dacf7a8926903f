"""Rotary angles and ALiBi slopes."""

import cmath

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effscale.models import Rotary
from effscale.models.context import positions_of
from effscale.models.positions import alibi_slopes, rotary_angles, rotate


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dim", [2, 6, 8])
def test_rotate_turns_pairs_as_complex_numbers(interleaved, dim, getkey):
    x = jax.random.normal(getkey(), (2, 3, 5, 8))  # batch, heads, seq, head_dim
    positions = jnp.array([[0, 1, 2, 3, 4], [7, 7, 100, 3, 0]])
    rotary = Rotary(dim=dim, base=50.0, interleaved=interleaved)
    found = np.asarray(rotate(x, rotary_angles(positions, dim, 50.0), rotary))
    expected = np.array(x)
    for b, h, s in np.ndindex(2, 3, 5):
        for i in range(dim // 2):
            first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + dim // 2)
            z = complex(x[b, h, s, first], x[b, h, s, second])
            z *= cmath.exp(1j * int(positions[b, s]) * 50.0 ** (-2 * i / dim))
            expected[b, h, s, first], expected[b, h, s, second] = z.real, z.imag
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_one_row_of_angles_serves_a_batch(getkey):
    x = jax.random.normal(getkey(), (2, 3, 5, 8))
    one, many = (
        rotary_angles(p, 8, 1e4) for p in (jnp.arange(5)[None], jnp.stack([jnp.arange(5)] * 2))
    )
    np.testing.assert_array_equal(rotate(x, one, Rotary()), rotate(x, many, Rotary()))


@given(shift=st.integers(0, 500), interleaved=st.booleans())
def test_rotated_products_depend_on_distance_only(shift, interleaved):
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    rotary = Rotary(interleaved=interleaved)
    at = lambda x, position: rotate(x, rotary_angles(jnp.array([[position]]), 8, 1e4), rotary)
    product = lambda i, j: float((at(q, i) * at(k, j)).sum())
    assert product(5 + shift, 2 + shift) == pytest.approx(product(5, 2), abs=1e-3)


def test_interleaved_is_half_split_of_permuted_dimensions(getkey):
    x = jax.random.normal(getkey(), (1, 2, 4, 8))
    angles = rotary_angles(jnp.arange(4)[None], 8, 1e4)
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    interleaved = rotate(x, angles, Rotary(interleaved=True))
    np.testing.assert_array_equal(interleaved[..., order], rotate(x[..., order], angles, Rotary()))


@pytest.mark.parametrize(
    ("heads", "golden"),
    [
        (12, {0: 0.5, 7: 2**-8, 8: 0.70711, 9: 0.35355, 10: 0.17678, 11: 0.08839}),
        (16, {0: 0.70711, 1: 0.5, 2: 0.35355, 15: 2**-8}),
        (112, {0: 0.917004, 63: 0.00390625, 64: 0.957603, 111: 0.0163168}),
        (1, {0: 2**-8}),
        (3, {0: 2**-4, 1: 2**-8, 2: 2**-2}),
    ],
)
def test_alibi_slopes(heads, golden):
    slopes = alibi_slopes(heads)
    assert slopes.shape == (heads,)
    for head, slope in golden.items():
        assert float(slopes[head]) == pytest.approx(slope, abs=6e-6)


@given(st.integers(1, 200))
def test_alibi_slopes_are_distinct_and_below_one(heads):
    slopes = alibi_slopes(heads)
    assert len(set(slopes.tolist())) == heads
    assert ((slopes > 0) & (slopes < 1)).all()


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_positions_count_real_tokens(mask):
    found = positions_of(jnp.array([mask]))[0].tolist()
    for i, real in enumerate(mask):
        if real:
            assert found[i] == sum(mask[:i])
    assert min(found) == 0 or mask[0] is True
