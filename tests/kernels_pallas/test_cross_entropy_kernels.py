"""The Pallas kernels, interpreted on the CPU, and what each platform's program contains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType

import kernels_pallas
from benchmarks.kernels.cross_entropy import SHAPES, Shape, with_tag
from kernels_pallas.cross_entropy import gpu, tpu
from kernels_pallas.dispatch import Unsupported
from tests.kernels_pallas.cross_entropy_oracle import Oracle, assert_close, oracle

SMALL = with_tag("test")
BY_NAME = {shape.name: shape for shape in SHAPES}
needs_gpu_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason=f"jax {jax.__version__} has no interpreter for Mosaic GPU kernels; jax 0.12 has",
)


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


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.name)
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
@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.name)
def test_gpu_kernel(shape, getkey):
    interpret = plgpu.InterpretGPUParams()
    for z_loss, with_bias in ((0.0, False), (0.02, True)):
        check(gpu.gpu_loss_and_gradients, shape, getkey(), z_loss, with_bias, interpret=interpret)


def test_gpu_loss_alone(getkey):
    operands = BY_NAME["odd"].operands(getkey())
    loss = run_kernel(gpu.gpu_loss, operands, 0.02, True)
    np.testing.assert_allclose(loss, oracle(operands, 0.02).loss, rtol=2e-6)


def lowered_for(platform, implementation=None, shape="odd", device_kind=None):
    operands = BY_NAME[shape].abstract()

    def loss(hidden, weight, bias, labels, weights):
        return kernels_pallas.cross_entropy(
            hidden, weight, labels, weights=weights, bias=bias, implementation=implementation
        )

    def lower():
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(*operands)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    if device_kind is None:
        return lower()
    device = jax.sharding.AbstractDevice(device_kind, None, platform)
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return lower()


def test_each_platform_gets_its_own_kernels_from_one_host():
    assert "custom_call" not in lowered_for("cpu")
    assert "tpu_custom_call" in lowered_for("tpu")
    assert "mosaic_gpu" in lowered_for("cuda", device_kind="NVIDIA H100 80GB HBM3")


def test_a_gpu_that_is_not_hopper_gets_the_chunked_form():
    assert "mosaic_gpu" not in lowered_for("cuda")
    assert "mosaic_gpu" not in lowered_for("cuda", device_kind="NVIDIA A100-SXM4-80GB")


def test_a_name_is_taken_at_its_word():
    assert "tpu_custom_call" not in lowered_for("tpu", implementation="chunked")
    with pytest.raises(ValueError, match="interpret mode"):
        lowered_for("cpu", implementation="tpu")


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
