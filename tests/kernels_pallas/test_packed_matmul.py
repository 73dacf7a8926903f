"""Products of floats and packed weights: the jnp form against NumPy, and the kernels against the same numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from benchmarks.kernels.packed_matmul import SHAPES, Shape, with_tag
from kernels_pallas.dispatch import Unsupported
from kernels_pallas.packed_matmul import gpu, packed_matmul, tpu
from tests.kernels_pallas.support import (
    A100,
    H100,
    codes_of,
    lowered_for,
    named,
    needs_gpu_interpreter,
)

SMALL = with_tag("test")
BY_NAME = {shape.name: shape for shape in SHAPES}


def oracle(shape, operands):
    """Each number of the weight times each input, in float64; and a bound on what float32 sums may lose."""
    x, weight, scale, zero, bias = (None if a is None else np.asarray(a) for a in operands)
    per_input = lambda a: np.repeat(a.astype(float), shape.d_in // shape.groups, axis=0).T
    numbers = codes_of(weight, shape.bits) * per_input(scale)
    if zero is not None:
        numbers += per_input(zero)
    x = x.astype(float)
    y = x @ numbers.T + bias.astype(float)[None]
    return np.tanh(y), np.abs(x) @ np.abs(numbers).T


def check(function, shape, key, *, weight_rounded=False, **options):
    """`weight_rounded`: the numbers of the weight are rounded to the type of the inputs before the product.

    The arrays are waited for: an interpreter calls back into Python, and hung when other work was dispatched meanwhile.
    """
    operands = jax.block_until_ready(jax.jit(shape.operands)(key))
    call = functools.partial(function, bits=shape.bits, activation=jnp.tanh, **options)
    found = jax.block_until_ready(jax.jit(call)(*operands))
    assert found.dtype == operands.x.dtype
    expected, size = oracle(shape, operands)
    short = shape.dtype == "bfloat16"
    errors = np.abs(np.asarray(found, np.float64) - expected)
    assert (
        errors <= (2**-8 if short else 1e-6) + (2**-9 if weight_rounded and short else 2e-6) * size
    ).all()


@named(SMALL)
def test_reference(shape, getkey):
    check(packed_matmul, shape, getkey(), weight_rounded=True)


@named(SMALL)
def test_tpu_kernel(shape, getkey):
    check(tpu.packed_matmul, shape, getkey(), interpret=True)


@named([BY_NAME["narrow-4"], BY_NAME["channel-1"]])
def test_tpu_kernel_with_the_memories_of_a_tpu(shape, getkey):
    """This interpreter starts memory as NaN and refuses reads out of bounds."""
    check(tpu.packed_matmul, shape, getkey(), interpret=pltpu.InterpretParams())


def test_experts_of_a_vmap_have_products_of_their_own(getkey):
    shape = BY_NAME["channel-8"]
    experts = [jax.jit(shape.operands)(key) for key in jax.random.split(getkey(), 2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *experts)
    call = functools.partial(tpu.packed_matmul, bits=8, activation=jnp.tanh, interpret=True)
    for one, found in zip(experts, jax.jit(jax.vmap(call))(*stacked), strict=True):
        np.testing.assert_allclose(found, oracle(shape, one)[0], atol=1e-5)


@needs_gpu_interpreter
@named(with_tag("gpu test"))
def test_gpu_kernel(shape, getkey):
    check(gpu.packed_matmul, shape, getkey(), interpret=plgpu.InterpretGPUParams())


def test_each_platform_gets_its_own_kernel_from_one_host():
    def text(platform, name="hopper-4", device_kind=None, implementation=None):
        shape = BY_NAME[name]
        run = functools.partial(packed_matmul, bits=shape.bits, implementation=implementation)
        return lowered_for(platform, run, shape.abstract(), device_kind)

    assert "custom_call" not in text("cpu")
    assert text("tpu").count("@tpu_custom_call") == 1
    assert "custom_call" not in text("tpu", implementation="reference")
    assert "mosaic_gpu" in text("cuda", device_kind=H100)
    assert "mosaic_gpu" not in text("cuda", device_kind=A100)
    assert "mosaic_gpu" not in text("cuda", "narrow-4", device_kind=H100)


def test_a_named_kernel_that_cannot_serve_says_why():
    def why(name, **change):
        given = {"rows": 8, "d_in": 768, "d_out": 128, "bits": 4, "dtype": "bfloat16"} | change
        shape = Shape(name="why", **given)
        call = functools.partial(packed_matmul, bits=shape.bits, implementation=name)
        with pytest.raises(Unsupported) as caught:
            jax.eval_shape(call, *shape.abstract())
        call = functools.partial(packed_matmul, bits=shape.bits)
        assert jax.eval_shape(call, *shape.abstract()).shape == (shape.rows, shape.d_out)
        return str(caught.value)

    assert "groups of 48 inputs neither divide 128 nor are a multiple" in why("tpu", groups=16)
    assert "groups of 256 inputs do not divide the 384 inputs of a plane" in why("tpu", groups=3)
    assert "x has 129 rows, and the kernel supports at most 128" in why("tpu", rows=129)
    assert "d_in=16777216 leaves no room" in why("tpu", d_in=2**24)
    assert "x is float32, and the kernel supports bfloat16" in why("gpu", dtype="float32")
    assert "x has 65 rows, and the kernel supports at most 64" in why("gpu", rows=65)
    assert "multiples of 128 outputs and of 64 bytes" in why("gpu", d_out=64)
    assert "groups of 32 inputs are not a multiple of 64" in why("gpu", groups=24)


def test_bad_input():
    x, weight, scale = jnp.zeros((2, 8)), jnp.zeros((3, 4), jnp.int8), jnp.ones((1, 3))
    with pytest.raises(
        ValueError,
        match=r"x must have the 4 inputs of weight .* with 8-bit codes, got the shape \(2, 8\)",
    ):
        packed_matmul(x, weight, scale)
    with pytest.raises(ValueError, match=r"bits must be one of \(1, 2, 4, 8\), got 3"):
        packed_matmul(x, weight, scale, bits=3)
    with pytest.raises(
        ValueError, match=r"scale must be .* groups that divide the 8 inputs, got \(3, 3\)"
    ):
        packed_matmul(x, weight, jnp.ones((3, 3)), bits=4)
