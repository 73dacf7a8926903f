"""The attention layer against a slow NumPy reference."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effscale.models import Alibi, AttentionConfig, Rotary, build_context
from effscale.models.attention import Attention, softmax_attention
from effscale.models.positions import alibi_slopes, rotary_angles, rotate

D_MODEL, HEAD = 24, 6


def slow(q, k, v, *, scale, causal, mask, segments, slopes, positions):
    """Loops over rows, heads and queries; arrays are (batch, seq, heads, head_dim), in float64."""
    batch, seq, heads, _ = q.shape
    out = np.zeros_like(q)
    for b, h, i in np.ndindex(batch, heads, seq):
        scores = {}
        for j in range(seq):
            if (causal and j > i) or not mask[b, j] or segments[b, i] != segments[b, j]:
                continue
            group = h // (heads // k.shape[2])
            scores[j] = q[b, i, h] @ k[b, j, group] * scale
            scores[j] += slopes[h] * (positions[b, j] - positions[b, i])
        if scores:
            top = max(scores.values())
            weights = {j: np.exp(s - top) for j, s in scores.items()}
            out[b, i, h] = sum(w * v[b, j, group] for j, w in weights.items()) / sum(
                weights.values()
            )
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["none", "rotary", "alibi"])
@pytest.mark.parametrize(("kv_heads", "scale"), [(4, None), (2, None), (2, 0.7), (1, None)])
def test_layer(causal, kind, kv_heads, scale, getkey):
    if kind == "alibi" and not causal:
        kind = "none"
    positions_kind = {"none": None, "rotary": Rotary(dim=4, base=100.0), "alibi": Alibi()}[kind]
    config = AttentionConfig(num_heads=4, num_kv_heads=kv_heads, scale=scale)
    layer = Attention(
        config, D_MODEL, positions=positions_kind, std=0.5, out_std=0.5, rngs=nnx.Rngs(0)
    )
    for part in (layer.query, layer.key, layer.value, layer.out):
        part.bias[...] = jax.random.normal(getkey(), part.bias[...].shape)
    batch, seq = 3, 8
    x = jax.random.normal(getkey(), (batch, seq, D_MODEL))
    mask = np.ones((batch, seq), bool)
    mask[1, :3] = mask[2, 6:] = False
    segments = np.ones((batch, seq), int)
    segments[0, 5:] = 2
    positions = np.stack(
        [[0, 1, 2, 3, 4, 0, 1, 2], [0, 0, 0, 0, 1, 2, 3, 4], [5, 6, 8, 10, 11, 12, 0, 0]]
    )

    context = build_context(
        seq, kind=positions_kind, head_dim=HEAD, causal=causal,
        valid=jnp.asarray(mask), positions=jnp.asarray(positions), segments=jnp.asarray(segments),
    )  # fmt: skip
    found, cache, report = jax.jit(lambda layer, x, c: layer(x, c))(layer, x, context)
    assert cache is None
    assert report == {}

    heads = lambda part: np.asarray(part(x), np.float64).reshape(batch, seq, -1, HEAD)
    q, k, v = heads(layer.query), heads(layer.key), heads(layer.value)
    if kind == "rotary":
        angles = rotary_angles(jnp.asarray(positions), 4, 100.0)
        turn = lambda y: np.asarray(
            rotate(jnp.asarray(y.swapaxes(1, 2), jnp.float32), angles, positions_kind), np.float64
        ).swapaxes(1, 2)
        q, k = turn(q), turn(k)
    slopes = alibi_slopes(4) if kind == "alibi" else np.zeros(4)
    scale = 1 / math.sqrt(HEAD) if scale is None else scale
    masks = {"causal": causal, "mask": mask, "segments": segments}
    mixed = slow(q, k, v, scale=scale, slopes=slopes, positions=positions, **masks)
    expected = mixed.reshape(batch, seq, -1) @ np.asarray(
        layer.out.kernel[...], np.float64
    ) + np.asarray(layer.out.bias[...])
    np.testing.assert_allclose(np.asarray(found)[mask], expected[mask], atol=2e-5)


def test_a_query_that_sees_nothing_is_finite_and_so_are_its_gradients(getkey):
    q, k, v = jax.random.normal(getkey(), (3, 1, 2, 4, 8))
    allowed = jnp.zeros((1, 1, 4, 4), bool)
    out, grads = jax.value_and_grad(
        lambda *x: softmax_attention(*x, allowed=allowed).sum(), (0, 1, 2)
    )(q, k, v)
    np.testing.assert_allclose(out, v.mean(2).sum() * 4, rtol=1e-4)
    assert all(jnp.isfinite(g).all() for g in grads)


def test_large_scores_do_not_overflow(getkey):
    q, k, v = jax.random.normal(getkey(), (3, 1, 2, 4, 8))
    out = softmax_attention(1e4 * q, 1e4 * k, v)
    assert jnp.isfinite(out).all()
    best = jnp.argmax(jnp.einsum("bhqd,bhkd->bhqk", q, k), -1)
    np.testing.assert_allclose(out, jnp.take_along_axis(v, best[..., None], 2), atol=1e-5)


def test_products_of_bfloat16_sum_in_float32(getkey):
    q, k, v = jax.random.normal(getkey(), (3, 1, 2, 64, 8)).astype(jnp.bfloat16)
    exact = softmax_attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    out = softmax_attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.02)


def test_dropped_weights_keep_the_mean(getkey):
    q, k = jax.random.normal(getkey(), (2, 1, 2, 4, 8))
    v = jnp.ones((1, 2, 4, 8))
    drop = jax.vmap(lambda key: softmax_attention(q, k, v, rate=0.3, key=key))
    out = drop(jax.random.split(getkey(), 2000))
    assert float(out.std()) > 0.1
    np.testing.assert_allclose(out.mean(0), v, atol=0.05)
