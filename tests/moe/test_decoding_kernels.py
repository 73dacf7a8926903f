"""Decoding by kernels: the same numbers as without them, and where they are used."""

import dataclasses
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from effscale.models import MLPConfig
from effscale.models.context import build_context
from effscale.moe import MoEConfig, RouterConfig, decoding, top_k_routing
from tests.kernels_pallas.support import H100, lowered_for

V5E = "TPU v5 lite"
D_MODEL = 16


def make(num_experts=6, **changes):
    expert = MLPConfig(d_ff=24, activation="silu", gated=True)
    options = {"expert": expert, "router": RouterConfig(k=2), **changes}
    config = MoEConfig(num_experts=num_experts, **options)
    return config.build(D_MODEL, std=0.5, out_std=0.5, rngs=nnx.Rngs(0))


def context(rows, *, cached=True, valid=None):
    made = build_context(1, kind=None, head_dim=8, causal=True, valid=valid)
    return dataclasses.replace(made, cached=cached)


def program(platform, layer, rows=5, kind=None, **options):
    run = lambda layer, x: layer(x, context(rows, **options))[0]
    x = jax.ShapeDtypeStruct((rows, 1, D_MODEL), jnp.float32)
    return lowered_for(platform, run, (layer, x), kind)


@pytest.mark.parametrize(("k", "normalize"), [(1, "none"), (2, "kept")])
def test_the_choice_is_that_of_top_k_routing(k, normalize):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(30, 7)), jnp.float32)
    used = jnp.asarray(rng.uniform(size=30) < 0.8)
    found = decoding.route(logits, k, used, normalize=normalize != "none")
    probs = jax.nn.softmax(logits)
    expected = top_k_routing(probs, k, used=used, normalize=normalize, priority="token")
    np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-6)
    filled = int(expected.sizes.sum())
    np.testing.assert_array_equal(found.order[:filled], expected.order[:filled])
    assert (found.order[filled:] == 30 * k).all()
    real = np.asarray(expected.kept)
    np.testing.assert_array_equal(found.kept, real)
    for name in ("experts", "sizes"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    np.testing.assert_array_equal(found.positions[real], expected.positions[real])


GATED = MLPConfig(d_ff=24, activation="silu", gated=True, bias=False)
BIASES = MLPConfig(d_ff=24, activation="gelu")


@pytest.mark.parametrize(
    ("expert", "implementation"),
    [(GATED, "reference"), (BIASES, "reference"), (BIASES, "tpu")],
    ids=["gated", "biases", "biases tpu"],
)
def test_the_sums_are_those_of_the_layer(expert, implementation, getkey):
    layer = make(num_experts=3, expert=expert)
    layer.experts = jax.tree.map(lambda a: a + 0.1, layer.experts)  # biases, too
    x = jax.random.normal(getkey(), (4, 1, D_MODEL))
    valid = jnp.array([[True], [False], [True], [True]])
    run = jax.jit(lambda layer, x: layer(x, context(4, valid=valid))[0][:, 0])
    expected = run(layer, x)

    @jax.jit
    def routed(layer, x):
        return decoding.route(layer.router.logits(x), 2, valid[:, 0], normalize=True)

    routing = jax.tree.map(lambda a: a[None], routed(layer, x[:, 0]))
    by = jax.jit(decoding.by_kernels, static_argnums=3)
    operands = jax.block_until_ready((layer.experts, x[None, :, 0], routing))
    interpreted = pltpu.force_tpu_interpret_mode if implementation == "tpu" else nullcontext
    with interpreted():
        found = jax.block_until_ready(by(*operands, implementation))
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


CHOICE, PRODUCTS = 1, 5
"""Kernels: products need the table of rows and, each for itself until the compiler makes them one, a list of steps."""


def test_where_kernels_decode():
    layer = make()
    text = program("tpu", layer, kind=V5E)
    assert text.count("@tpu_custom_call") == CHOICE + PRODUCTS
    assert "ragged_dot" not in text
    assert "@tpu_custom_call" not in program("tpu", layer, kind=V5E, cached=False)
    many = program("tpu", layer, rows=decoding.MOST_TOKENS + 1, kind=V5E)
    assert many.count("@tpu_custom_call") == CHOICE
    for platform, kind in (("cpu", None), ("cuda", H100)):
        text = program(platform, layer, kind=kind)
        assert "tpu_custom_call" not in text
        assert "mosaic" not in text


@pytest.mark.parametrize(
    ("changes", "kernels"),
    [
        ({"dispatch": "table"}, CHOICE),
        ({"router": RouterConfig(k=2, score="sigmoid")}, PRODUCTS),
        ({"router": RouterConfig(k=2, balance_by_bias=True, balance=0.0)}, PRODUCTS),
        ({"groups": 5, "dispatch": "table"}, CHOICE),
    ],
    ids=["table", "sigmoid", "bias", "groups"],
)
def test_kernels_serve_what_they_compute_alone(changes, kernels):
    text = program("tpu", make(**changes), kind=V5E)
    assert text.count("@tpu_custom_call") == kernels
