"""Packed weights on accelerators: which products go to a kernel, and that bias, activation and gradient come with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from effscale.models import matmul
from effscale.models.activations import ACTIVATIONS
from effscale.quant import Format, pack_weight
from effscale.quant.packed import kernel_product
from effscale.quant.row_products import WITHIN

TOKENS = Format(granularity="token")
RANGES = Format(granularity="token", symmetric=False)
GROUPS = Format(bits=4, granularity="group", group_size=32, symmetric=False)
TPU, H100 = ("tpu", "TPU v5 lite"), ("cuda", "NVIDIA H100 80GB HBM3")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def kernels(weight, *, on, rows=8, devices=1):
    """Kernels in the program of a product in bfloat16, lowered for a mesh of such devices."""
    platform, kind = on
    device = jax.sharding.AbstractDevice(kind, None, platform)
    mesh = AbstractMesh((devices,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    x = jax.ShapeDtypeStruct((rows, weight.shape[0]), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct(weight.shape[1:], jnp.float32)
    run = jax.jit(lambda x, w, b: matmul(x, w, b, "gelu"))
    with jax.sharding.use_abstract_mesh(mesh):
        text = run.trace(x, weight, bias).lower(lowering_platforms=(platform,)).as_text()
    return text.count("@tpu_custom_call") + text.count("@mosaic_gpu")


@pytest.mark.parametrize(
    ("format", "activations", "on_tpu", "on_h100"),
    [
        (Format(), TOKENS, 1, 1),
        (Format(), RANGES, 1, 1),
        (Format(bits=4), TOKENS, 1, 0),
        (Format(bits=1, granularity="tensor"), TOKENS, 1, 0),
        (GROUPS, None, 1, 0),
        (Format(bits=4, granularity="group", group_size=64), None, 1, 1),
        (Format(bits=2, granularity="block", num_blocks=2), None, 1, 1),
        (Format(), None, 0, 0),  # the compilers do as well
        (Format(floating=True), None, 0, 0),
        (GROUPS, TOKENS, 0, 0),
        (Format(), Format(granularity="token", symmetric=False, integer_zero=False), 0, 0),
        (Format(symmetric=False), TOKENS, 0, 0),
        (Format(), Format(granularity="tensor"), 0, 0),
    ],
)
def test_which_products_go_to_a_kernel(format, activations, on_tpu, on_h100):
    weight = pack_weight(normal(0, 256, 128), format, activations=activations)
    assert (kernels(weight, on=TPU), kernels(weight, on=H100)) == (on_tpu, on_h100)


def test_where_there_is_no_kernel():
    """On CPUs, on meshes that the compiler partitions, and for tables, programs are as they were."""
    weight = pack_weight(normal(0, 256, 128), Format(bits=4))
    assert kernels(weight, on=TPU) == 1
    assert kernels(weight, on=TPU, rows=512) == 0
    assert kernels(weight, on=TPU, devices=8) == 0
    assert kernels(weight, on=("cpu", "cpu")) == 0
    table = pack_weight(normal(0, 256, 128), Format(bits=4), is_table=True)
    assert kernels(table, on=TPU) == 0
    assert kernels(table.T, on=TPU) == 1


@pytest.mark.parametrize(
    ("format", "activations"),
    [
        (Format(bits=4, granularity="block", num_blocks=4), TOKENS),
        (Format(), RANGES),
        (GROUPS, None),
    ],
    ids=["int8", "zero points", "group"],
)
def test_values_and_gradients(format, activations):
    """The ops, which have their jnp form here, get the right numbers: value and gradients are those of the other form."""
    weight = pack_weight(normal(0, 64, 16), format, activations=activations)
    x, bias = normal(1, 3, 64), normal(2, 16)
    by_kernel = lambda x, bias: kernel_product("gelu", x, bias, weight)
    plain = lambda x, bias: matmul(x, weight, bias, "gelu")
    np.testing.assert_allclose(jax.jit(by_kernel)(x, bias), plain(x, bias), rtol=1e-4, atol=1e-5)
    of = lambda product: jax.jit(jax.grad(lambda *a: (product(*a) ** 2).sum(), (0, 1)))(x, bias)
    for found, expected in zip(of(by_kernel), of(plain), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_activations_within_kernels():
    x = jnp.linspace(-9.0, 9.0, 1001)
    assert "gelu" in WITHIN
    assert "mish" not in WITHIN
    for name, function in WITHIN.items():
        np.testing.assert_allclose(function(x), ACTIVATIONS[name](x), rtol=1e-6, atol=2e-6)
