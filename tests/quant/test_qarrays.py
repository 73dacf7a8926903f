import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effscale.quant import Format, from_qarray, pack_weight, to_qarray
from effscale.quant.packed import PackedWeight

qwix = pytest.importorskip("qwix", reason="qwix is not installed")

FORMATS = [
    Format(),
    Format(granularity="tensor"),
    Format(symmetric=False),
    Format(floating=True),
    Format(bits=4, granularity="group", group_size=16),
    Format(bits=4, symmetric=False, granularity="group", group_size=16),
    Format(bits=4, granularity="block", num_blocks=4),
    Format(bits=3),
    Format(bits=2, granularity="tensor"),
]


@pytest.fixture(scope="module")
def kernels():
    return jax.random.normal(jax.random.key(0), (3, 32, 8))


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.describe())
def test_the_numbers_are_the_same_there_and_back(kernels, format):
    packed = pack_weight(kernels, format)
    array = to_qarray(packed)
    np.testing.assert_allclose(qwix.dequantize(array), packed.dense(), rtol=1e-6, atol=1e-6)
    back = from_qarray(array)
    assert isinstance(back, PackedWeight)
    np.testing.assert_array_equal(back.data, packed.data)
    np.testing.assert_allclose(back.dense(), packed.dense(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("int8", {"channelwise_axes": (0, 2)}),
        ("int8", {"channelwise_axes": (0,)}),
        ("int8", {"channelwise_axes": (0, 2), "calibration_method": "minmax"}),
        ("int4", {"channelwise_axes": (0, 2), "tiled_axes": {1: 8}}),
        ("float8_e4m3fn", {"channelwise_axes": (0, 2)}),
    ],
)
def test_what_qwix_quantized_multiplies_here(kernels, kind, options):
    array = qwix.quantize(kernels, kind, **options)
    packed = from_qarray(array)
    np.testing.assert_allclose(packed.dense(), qwix.dequantize(array), rtol=1e-6, atol=1e-6)
    x = jax.random.normal(jax.random.key(1), (3, 5, 32))
    found = jax.vmap(lambda w, x: w.matmul(x, None, None))(packed, x)
    np.testing.assert_allclose(found, x @ qwix.dequantize(array), rtol=1e-4, atol=1e-4)


def test_products_of_codes_agree(kernels):
    """qwix's own int8 product, with one scale per token and one per output."""
    array = qwix.quantize(kernels[0], "int8", channelwise_axes=(1,))
    # The largest number of a token is positive: a negative one lies half-way between two codes, and divisions differ there.
    x = jax.random.normal(jax.random.key(1), (5, 32)).at[:, 0].set(4.0)
    tokens = Format(granularity="token", spread="centered")
    found = from_qarray(array, activations=tokens).matmul(x, None, None)
    with jax.numpy_dtype_promotion("standard"):
        wanted = qwix.dot(qwix.quantize(x, "int8", channelwise_axes=(0,)), array)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_what_the_other_side_does_not_have_is_refused(kernels):
    with pytest.raises(ValueError, match="one bit"):
        to_qarray(pack_weight(kernels, Format(bits=1)))
    with pytest.raises(ValueError, match="table"):
        to_qarray(pack_weight(kernels, Format(), is_table=True))
    floats = Format(bits=4, symmetric=False, integer_zero=False)
    with pytest.raises(ValueError, match="integer multiples of its scales"):
        to_qarray(pack_weight(kernels, floats))
    with pytest.raises(ValueError, match="got codes of nf4"):
        from_qarray(qwix.quantize(kernels, "nf4", channelwise_axes=(0, 2)))
    with pytest.raises(ValueError, match=r"scales of shape \(1, 1, 8\)"):
        from_qarray(qwix.quantize(kernels, "int8", channelwise_axes=(2,)))
    with pytest.raises(ValueError, match="-2"):
        from_qarray(qwix.QArray(jnp.full((8, 4), -2, jnp.int2), jnp.ones((1, 4)), None, "int2"))
