"""The smallest modules against slow NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effscale.models import Dense
from effscale.models.activations import ACTIVATIONS
from effscale.models.layers import Embedding, LayerNorm, RMSNorm, dropout


def tanh_gelu(root):
    return lambda x: 0.5 * x * (1 + math.tanh(root * x * (1 + 0.044715 * x**2)))


SLOW = {
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": tanh_gelu(math.sqrt(2 / math.pi)),
    "gelu_fast": tanh_gelu(0.7978845608),
    "gelu_bloom": tanh_gelu(0.79788456),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "relu6": lambda x: min(max(x, 0.0), 6.0),
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "linear": lambda x: x,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name):
    x = np.linspace(-6, 6, 241)
    found = ACTIVATIONS[name](jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, [SLOW[name](v) for v in x], atol=3e-6)


def test_tanh_gelus_lie_where_the_published_distances_say():
    x = jnp.linspace(-6, 6, 4001)
    distance = lambda a, b: float(jnp.abs(ACTIVATIONS[a](x) - ACTIVATIONS[b](x)).max())
    assert distance("gelu_bloom", "gelu_tanh") < 1e-6
    assert 4.5e-4 < distance("gelu_tanh", "gelu") < 5e-4


@pytest.mark.parametrize(("scale", "bias"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
def test_norm(kind, scale, bias, getkey):
    x = np.asarray(3 + 2 * jax.random.normal(getkey(), (2, 5, 7)), np.float64)
    norm = kind(7, epsilon=0.1, scale=scale, bias=bias)
    expected = x - x.mean(-1, keepdims=True) * (kind is LayerNorm)
    expected = expected / np.sqrt((expected**2).mean(-1, keepdims=True) + 0.1)
    if scale:
        norm.scale[...] = jax.random.normal(getkey(), (7,))
        expected = expected * np.asarray(norm.scale[...])
    if bias:
        norm.bias[...] = jax.random.normal(getkey(), (7,))
        expected = expected + np.asarray(norm.bias[...])
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, atol=1e-5)


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
def test_norm_computes_in_float32(kind):
    x = (1000 + jnp.arange(8, dtype=jnp.float32)).astype(jnp.bfloat16)[None]
    norm = kind(8)
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm(x), norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)])
def test_dense_over_any_leading_dimensions(lead, getkey):
    layer = Dense(4, 6, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(6.0)
    x = jax.random.normal(getkey(), (*lead, 4))
    expected = np.asarray(x, np.float64) @ np.asarray(layer.kernel[...], np.float64) + np.arange(6)
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)


def test_dense_computes_in_the_type_of_its_input():
    layer = Dense(4, 6, rngs=nnx.Rngs(0))
    assert layer(jnp.ones((2, 4), jnp.bfloat16)).dtype == jnp.bfloat16
    assert layer.kernel[...].dtype == jnp.float32


def test_initial_standard_deviation():
    layer = Dense(100, 200, std=0.05, rngs=nnx.Rngs(0))
    assert float(layer.kernel[...].std()) == pytest.approx(0.05, rel=0.03)
    assert not layer.bias[...].any()


def test_embedding_rows_and_logits(getkey):
    table = Embedding(5, 4, rngs=nnx.Rngs(0))
    rows = np.asarray(table.embedding[...])
    ids = jnp.array([[0, 4], [2, 2]])
    np.testing.assert_array_equal(table(ids), rows[np.asarray(ids)])
    np.testing.assert_array_equal(
        table(jnp.array([-3, 99]) % 99), rows[[4, 0]]
    )  # beyond the table: its last row
    x = jax.random.normal(getkey(), (2, 3, 4))
    np.testing.assert_allclose(table.attend(x), np.asarray(x) @ rows.T, atol=1e-6)


def test_dropout(getkey):
    x = jnp.full((100, 100), 2.0)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, getkey()) is x
    y = dropout(x, 0.2, getkey())
    assert set(np.unique(y)) == {0.0, 2.5}
    assert float(y.mean()) == pytest.approx(2.0, abs=0.05)
    assert not jnp.array_equal(y, dropout(x, 0.2, getkey()))
    assert dropout(x.astype(jnp.bfloat16), 0.2, getkey()).dtype == jnp.bfloat16
