"""The Pallas kernels, interpreted on the CPU, and what each platform's program contains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

import kernels_pallas
from benchmarks.kernels.cross_entropy import SHAPES, Shape, with_tag
from kernels_pallas.cross_entropy import gpu, tpu
from kernels_pallas.dispatch import Unsupported
from tests.kernels_pallas.cross_entropy_oracle import Oracle, assert_close, oracle
from tests.kernels_pallas.support import A100, H100, lowered_for, named, needs_gpu_interpreter

SMALL = with_tag("test")
BY_NAME = {shape.name: shape for shape in SHAPES}


def run_kernel(function, operands, z_loss, with_bias, **options):
    """Loss and gradients of a kernel function, which expects ignored labels to weigh 0."""
    hidden, weight, bias, labels, weights = operands
    weights = jnp.where(labels >= 0, weights, 0.0)
    function = functools.partial(function, z_loss=z_loss, **options)
    operands = (hidden, weight, bias if with_bias else None, labels, weights)
    # An interpreter calls back into Python, and may hang when other work is dispatched meanwhile.
    return jax.block_until_ready(jax.jit(function)(*jax.block_until_ready(operands)))


def check(function, shape, key, z_loss, with_bias, **options):
    operands = shape.operands(key)
    loss, gradients = run_kernel(function, operands, z_loss, with_bias, **options)
    expected = oracle(operands, z_loss, with_bias)
    assert_close(Oracle(loss, *gradients), expected, jnp.dtype(shape.dtype))
    return expected


@named(SMALL)
@pytest.mark.parametrize(("z_loss", "with_bias"), [(0.0, False), (0.02, True)])
def test_tpu_kernels(shape, z_loss, with_bias, getkey):
    check(tpu.tpu_loss_and_gradients, shape, getkey(), z_loss, with_bias, interpret=True)


def test_tpu_kernels_over_several_tiles(getkey):
    shape = Shape(name="several tiles", tokens=1100, d=128, vocab=1500, dtype="bfloat16")
    check(tpu.tpu_loss_and_gradients, shape, getkey(), 0.02, True, interpret=True)


@pytest.mark.parametrize("name", ["odd", "edges-bf16"])
def test_tpu_kernels_with_the_memories_of_a_tpu(name, getkey):
    """This interpreter starts memory as NaN and refuses reads out of bounds."""
    interpret = pltpu.InterpretParams()
    check(tpu.tpu_loss_and_gradients, BY_NAME[name], getkey(), 0.02, True, interpret=interpret)


def test_tpu_loss_alone(getkey):
    operands = BY_NAME["odd"].operands(getkey())
    loss = run_kernel(tpu.tpu_loss, operands, 0.02, True, interpret=True)
    np.testing.assert_allclose(loss, oracle(operands, 0.02).loss, rtol=2e-6)


def test_tpu_through_the_public_function(getkey):
    operands = BY_NAME["odd"].operands(getkey())
    hidden, weight, bias, labels, weights = operands
    with pltpu.force_tpu_interpret_mode():
        loss, (d_hidden, d_weights) = jax.value_and_grad(
            lambda hidden, weights: kernels_pallas.cross_entropy(
                hidden, weight, labels, weights=weights, bias=bias, implementation="tpu"
            ),
            (0, 1),
        )(hidden, weights)
    found = Oracle(loss, d_hidden, None, None, d_weights)
    assert_close(found, oracle(operands), jnp.float32)


def test_tpu_tiles_shrink_with_the_width():
    assert tpu.tiles(768, 2) == (1024, 512)
    assert tpu.tiles(4096, 2) == (512, 256)
    wide = jax.ShapeDtypeStruct((64, 2**17), jnp.bfloat16)
    assert "d=131072 in bfloat16" in tpu.why_not(wide, wide)


@needs_gpu_interpreter
@named(SMALL)
def test_gpu_kernel(shape, getkey):
    interpret = plgpu.InterpretGPUParams()
    for z_loss, with_bias in ((0.0, False), (0.02, True)):
        check(gpu.gpu_loss_and_gradients, shape, getkey(), z_loss, with_bias, interpret=interpret)


def test_gpu_loss_alone(getkey):
    operands = BY_NAME["odd"].operands(getkey())
    loss = run_kernel(gpu.gpu_loss, operands, 0.02, True)
    np.testing.assert_allclose(loss, oracle(operands, 0.02).loss, rtol=2e-6)


def program(platform, implementation=None, device_kind=None):
    def loss(hidden, weight, bias, labels, weights):
        return kernels_pallas.cross_entropy(
            hidden, weight, labels, weights=weights, bias=bias, implementation=implementation
        )

    operands = BY_NAME["odd"].abstract()
    return lowered_for(platform, jax.grad(loss, (0, 1)), operands, device_kind)


def test_each_platform_gets_its_own_kernels_from_one_host():
    """GPUs before Hopper get the chunked form, and a name is taken at its word."""
    assert "custom_call" not in program("cpu")
    assert "tpu_custom_call" in program("tpu")
    assert "tpu_custom_call" not in program("tpu", implementation="chunked")
    assert "mosaic_gpu" in program("cuda", device_kind=H100)
    for other in (None, A100):
        assert "mosaic_gpu" not in program("cuda", device_kind=other)
    with pytest.raises(ValueError, match="interpret mode"):
        program("cpu", implementation="tpu")


def test_a_named_kernel_that_cannot_serve_says_why():
    shape = Shape(name="wide", tokens=8, d=2**17, vocab=16, dtype="bfloat16")
    hidden, weight, _, labels, _ = shape.abstract()
    loss = lambda implementation: jax.eval_shape(
        lambda *args: kernels_pallas.cross_entropy(*args, implementation=implementation),
        hidden,
        weight,
        labels,
    )
    with pytest.raises(Unsupported, match="'tpu' is not supported here: d=131072 in bfloat16"):
        loss("tpu")
    assert loss(None).shape == ()
