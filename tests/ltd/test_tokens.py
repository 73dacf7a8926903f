"""Tokens taken and put back, beside NumPy's loops, and the gradient beside the papers' rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effscale.ltd import put_tokens, sample_kept, take_tokens
from effscale.ltd.tokens import take_context
from effscale.models import Rotary, build_context

KEPT = jnp.array([[0, 3, 4], [1, 2, 5]])


def noise(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("features", [(), (4,), (4, 2)])
def test_take_and_put(features):
    x, y = noise(2, 6, *features), noise(2, 3, *features, seed=1)
    taken, put = np.zeros_like(y), np.array(x)
    for row in range(2):
        for slot, at in enumerate(np.asarray(KEPT[row])):
            taken[row, slot] = x[row, at]
            put[row, at] = y[row, slot]
    np.testing.assert_array_equal(take_tokens(x, KEPT), taken)
    np.testing.assert_array_equal(put_tokens(x, KEPT, y), put)


def test_one_row_stands_for_all():
    x = noise(1, 6, 4)
    both = jnp.broadcast_to(x, (2, 6, 4))
    np.testing.assert_array_equal(take_tokens(x, KEPT), take_tokens(both, KEPT))


def test_other_numbers_of_rows_are_an_error():
    with pytest.raises(ValueError, match="axis"):
        take_tokens(noise(3, 6), KEPT)


def test_the_gradient_passes_by_or_through_the_layer():
    """dL/dh is g at the tokens that pass by, and J^T g at those that went through f."""
    x, g, weight = noise(2, 6, 4), noise(2, 6, 4, seed=1), noise(4, 4, seed=2)
    layer = lambda x, weight: put_tokens(x, KEPT, take_tokens(x, KEPT) @ weight)
    loss = lambda x, weight: (layer(x, weight) * g).sum()
    found, of_weight = jax.grad(loss, (0, 1))(x, weight)
    expected, expected_weight = np.array(g), np.zeros((4, 4), np.float32)
    for row in range(2):
        for at in np.asarray(KEPT[row]):
            expected[row, at] = np.asarray(weight) @ np.asarray(g[row, at])
            expected_weight += np.outer(x[row, at], g[row, at])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(of_weight, expected_weight, rtol=1e-5)
    tangents = (noise(2, 6, 4, seed=3), noise(4, 4, seed=4))
    _, forward = jax.jvp(loss, (x, weight), tangents)
    backward = (found * tangents[0]).sum() + (of_weight * tangents[1]).sum()
    np.testing.assert_allclose(forward, backward, rtol=1e-5)


def test_a_context_keeps_what_each_token_is():
    random = np.random.default_rng(3)
    valid, segments = random.random((2, 6)) < 0.7, random.integers(1, 4, (2, 6))
    positions = np.sort(random.integers(0, 50, (2, 6)), 1)
    arrays = {"valid": valid, "segments": segments, "positions": positions}
    context = build_context(
        6,
        kind=Rotary(dim=4),
        head_dim=4,
        causal=True,
        **{k: jnp.asarray(v) for k, v in arrays.items()},
    )
    found = take_context(context, KEPT)
    at = lambda a: np.stack([a[row][np.asarray(KEPT[row])] for row in range(2)])
    mask = np.asarray(found.allowed(0, 3, 3))
    for row in range(2):
        for q in range(3):
            for k in range(3):
                a, b = int(KEPT[row, q]), int(KEPT[row, k])
                sees = a >= b and valid[row, b] and segments[row, a] == segments[row, b]
                assert mask[row, 0, q, k] == sees
    np.testing.assert_array_equal(found.real, at(valid))
    for name in ("positions", "key_positions"):
        np.testing.assert_array_equal(getattr(found, name), at(positions))
    angles = at(positions)[..., None] * np.array([1.0, 0.01])
    np.testing.assert_allclose(found.angles[0], np.sin(angles), atol=1e-5)
    np.testing.assert_allclose(found.angles[1], np.cos(angles), atol=1e-5)


def test_a_context_without_masks_has_none():
    context = build_context(6, kind=None, head_dim=4, causal=False)
    found = take_context(context, KEPT)
    assert found.allowed(0, 3, 3) is None
    assert found.angles is None
    assert found.real is None
    np.testing.assert_array_equal(found.positions, KEPT)


@pytest.mark.parametrize("transform", [jax.checkpoint, jax.vmap], ids=lambda f: f.__name__)
def test_under_transformations(transform):
    x, y = noise(2, 6, 4), noise(2, 3, 4, seed=1)
    function = lambda x, kept, y: jax.grad(
        lambda x: put_tokens(x, kept, y * take_tokens(x, kept)).sum()
    )(x)
    expected = function(x, KEPT, y)
    if transform is jax.vmap:
        found = transform(function)(*(jnp.stack([a, a]) for a in (x, KEPT, y)))[1]
    else:
        found = transform(function)(x, KEPT, y)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_over_scanned_layers():
    kept = sample_kept(jax.random.key(0), (1, 2, 3), 2, 6, 3)
    x = noise(2, 6, 4)
    layer = lambda x, kept: (put_tokens(x, kept, jnp.sin(take_tokens(x, kept))), None)
    out, _ = jax.lax.scan(layer, x, kept)
    for row in kept:
        x, _ = layer(x, row)
    np.testing.assert_allclose(out, x, rtol=1e-6)
