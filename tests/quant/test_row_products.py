"""The product of a single row on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from effscale.models import matmul
from effscale.quant import Format, pack_weight
from effscale.quant.formats import pack, unpack
from effscale.quant.row_products import LANES, TERMS, row_product, serves_row


@pytest.mark.parametrize("bits", [4, 3, 2, 1])
@pytest.mark.parametrize("lanes", [1, 3, TERMS // 2 + 1])
def test_sums_are_exact(bits, lanes):
    """Of random codes, and of the largest, whose sums come nearest to the end of 16 bits; in one loop and in several."""
    rng = np.random.default_rng(0)
    d_in = lanes * LANES * 8 // (4 if bits == 3 else bits)
    data = jnp.asarray(
        rng.integers(-128, 128, (5, d_in * (4 if bits == 3 else bits) // 8)), jnp.int8
    )
    x = rng.integers(-128, 128, (1, d_in)).astype(np.int8)
    lowest = pack(jnp.full((1, d_in), -1 if bits == 1 else -(2 ** (bits - 1)), jnp.int8), bits)
    product = jax.jit(row_product, static_argnums=2)
    for row, packed in ((x, data), (np.full_like(x, -128), lowest)):
        expected = row.astype(np.int64) @ np.asarray(unpack(packed, bits), np.int64).T
        np.testing.assert_array_equal(product(row, packed, bits), expected)


def test_where_it_serves():
    data = jnp.zeros((8, 2 * LANES), jnp.int8)
    assert serves_row(1, data, 4)
    assert not serves_row(4, data, 4)
    assert not serves_row(1, data, 8)
    assert not serves_row(1, data[:, 1:], 4)
    for size, kind in ((1, "tpu"), (8, "cpu")):
        device = jax.sharding.AbstractDevice(kind, None, kind)
        types = {"axis_types": (AxisType.Auto,), "abstract_device": device}
        mesh = jax.sharding.AbstractMesh((size,), ("data",), **types)
        with jax.sharding.use_abstract_mesh(mesh):
            assert not serves_row(1, data, 4)


def test_a_row_alone_is_what_it_is_among_others():
    """And there is no product of planes in its program."""
    rng = np.random.default_rng(1)
    kernel, x = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((128, 24), (2, 128))
    )
    tokens = Format(granularity="token", symmetric=False)
    weight = pack_weight(kernel, Format(bits=4), activations=tokens)
    product = jax.jit(lambda x, weight: matmul(x, weight, None, "silu"))
    np.testing.assert_allclose(product(x[:1], weight), product(x, weight)[:1], rtol=1e-6)
    assert "dot_general" not in product.lower(x[:1], weight).as_text()
