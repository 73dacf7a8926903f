"""Products of 8-bit inputs and packed weights: the jnp form against NumPy, and the kernels against the jnp form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from benchmarks.kernels.quantized_matmul import SHAPES, Shape, with_tag
from kernels_pallas import packed_codes
from kernels_pallas.dispatch import Unsupported
from kernels_pallas.quantized_matmul import gpu, quantized_matmul, reference, tpu
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


@given(bits=st.sampled_from(packed_codes.BITS), seed=st.integers(0, 1000))
def test_codes_come_out_of_bytes_and_of_words(bits, seed):
    packed = np.random.default_rng(seed).integers(-128, 128, (4, 3)).astype(np.int8)
    expected = codes_of(packed, bits)
    planes = packed_codes.unpack_planes(jnp.asarray(packed), bits)
    np.testing.assert_array_equal(np.concatenate(planes, axis=-1), expected)
    words = jnp.asarray(np.ascontiguousarray(packed.T).view(np.int32)[:, 0])
    for plane, word in zip(planes, packed_codes.unpack_words(words, bits), strict=True):
        bytes_ = np.asarray(word)[:, None].view(np.int8).T
        np.testing.assert_array_equal(bytes_, plane)


@named(SMALL)
def test_reference(shape, getkey):
    x, weight, scale, bias, code_sums = jax.jit(shape.operands)(getkey())
    x = x.at[2:3].set(3)
    call = functools.partial(quantized_matmul, bits=shape.bits, activation=jnp.tanh)
    found = jax.jit(call)(x, weight, scale, bias, code_sums)
    rows = np.asarray(x, np.float32)
    if shape.zero_points:
        low, high = rows.min(1, keepdims=True), rows.max(1, keepdims=True)
        steps = (high - low) / np.float32(255)
        safe = np.where(steps == 0, np.float32(1), steps)
        zeros = np.where(high == low, low, (np.round(low / safe) + 128) * steps)
    else:
        steps, zeros = np.abs(rows).max(1, keepdims=True) / np.float32(127), np.float32(0)
    exact = (rows - zeros) / np.where(steps == 0, np.float32(1), steps)
    codes = np.round(exact).astype(int)
    # Halfway between two codes, where some bfloat16 numbers lie, the rounding of a division decides.
    decided = (np.abs(np.abs(exact - codes) - 0.5) > 1e-4).all(1)
    y = (codes * steps + zeros) @ codes_of(weight, shape.bits).T
    y = y * np.asarray(scale)[None] + np.asarray(bias, np.float32)[None]
    assert found.dtype == x.dtype
    tolerance = 1e-5 if shape.dtype == "float32" else 1e-2
    found, expected = np.asarray(found, np.float32)[decided], np.tanh(y)[decided]
    assert len(expected) > len(y) // 2
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=1e-5)


def check(module, shape, key, *, with_bias=True, **options):
    """Equal to the jnp form: sums are exact, and the few operations behind them are the same.

    The arrays are waited for: an interpreter calls back into Python, and hung when other work was dispatched meanwhile.
    """
    operands = jax.jit(shape.operands)(key)
    if not with_bias:
        operands = operands._replace(bias=None)
    options |= {"bits": shape.bits, "activation": jax.nn.silu if with_bias else None}
    jax.block_until_ready(operands)
    found = jax.jit(functools.partial(module.quantized_matmul, **options))(*operands)
    found = np.asarray(jax.block_until_ready(found), np.float32)
    del options["interpret"]
    expected = jax.jit(functools.partial(reference.reference, **options))(*operands)
    tolerance = 1e-6 if shape.dtype == "float32" else 1e-2
    np.testing.assert_allclose(found, expected.astype(jnp.float32), rtol=tolerance, atol=1e-6)
    if not with_bias:
        np.testing.assert_array_equal(found[1], 0.0)  # the row of zeros


@named(SMALL)
def test_tpu_kernel(shape, getkey):
    check(tpu, shape, getkey(), interpret=True)


@named([BY_NAME["odd-4"], BY_NAME["edges-2"], BY_NAME["zeros-4"]])
def test_tpu_kernel_with_the_memories_of_a_tpu(shape, getkey):
    """This interpreter starts memory as NaN and refuses reads out of bounds."""
    check(tpu, shape, getkey(), with_bias=False, interpret=pltpu.InterpretParams())


def test_tpu_kernel_over_several_tiles_of_rows(getkey, monkeypatch):
    monkeypatch.setattr(tpu, "tiles", lambda *_: (64, 128))
    check(tpu, BY_NAME["tiles"], getkey(), interpret=True)


def test_experts_of_a_vmap_have_products_of_their_own(getkey):
    shape = BY_NAME["odd-4"]
    experts = [jax.jit(shape.operands)(key) for key in jax.random.split(getkey(), 2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *experts)
    call = functools.partial(tpu.quantized_matmul, bits=4, activation=None, interpret=True)
    for one, found in zip(experts, jax.jit(jax.vmap(call))(*stacked), strict=True):
        expected = reference.reference(*one, bits=4, activation=None)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_it_serves_within_a_shard_map(getkey):
    shape = BY_NAME["tiny"]
    x, weight, scale, bias, _ = jax.jit(shape.operands)(getkey())
    x = jnp.concatenate([x, x + 1])
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    run = jax.shard_map(
        functools.partial(quantized_matmul, implementation="tpu"),
        in_specs=(P("data"), P(), P(), P()),
        out_specs=P("data"),
    )
    jax.block_until_ready((x, weight, scale, bias))
    with jax.set_mesh(mesh), pltpu.force_tpu_interpret_mode():
        found = jax.block_until_ready(jax.jit(run)(x, weight, scale, bias))
    expected = jax.jit(quantized_matmul)(x, weight, scale, bias)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@needs_gpu_interpreter
@pytest.mark.parametrize(
    ("name", "with_bias"), [("tiles", True), ("tiles", False), ("zeros", True)]
)
def test_gpu_kernel(name, with_bias, getkey):
    interpret = plgpu.InterpretGPUParams()
    check(gpu, BY_NAME[name], getkey(), with_bias=with_bias, interpret=interpret)


def test_each_platform_gets_its_own_kernel_from_one_host():
    def text(platform, name="tiles", device_kind=None, implementation=None):
        shape = BY_NAME[name]
        run = functools.partial(quantized_matmul, bits=shape.bits, implementation=implementation)
        return lowered_for(platform, run, shape.abstract(), device_kind)

    assert "custom_call" not in text("cpu")
    assert text("tpu").count("@tpu_custom_call") == 1
    assert "custom_call" not in text("tpu", implementation="reference")
    assert "mosaic_gpu" in text("cuda", device_kind=H100)
    assert "mosaic_gpu" not in text("cuda", device_kind=A100)
    assert "mosaic_gpu" not in text("cuda", "odd-4", device_kind=H100)


def test_a_named_kernel_that_cannot_serve_says_why():
    wide = Shape(name="wide", rows=8, d_in=2**16, d_out=16, bits=1, dtype="float32")
    call = lambda shape, name: jax.eval_shape(
        functools.partial(quantized_matmul, bits=shape.bits, implementation=name), *shape.abstract()
    )
    with pytest.raises(Unsupported, match="'tpu' is not supported here: d_in=65536 leaves no room"):
        call(wide, "tpu")
    assert call(wide, None).shape == (8, 16)
    with pytest.raises(Unsupported, match="weights have 4 bits, and the kernel supports 8"):
        call(BY_NAME["odd-4"], "gpu")
    with pytest.raises(Unsupported, match=r"\(24, 64\) must have multiples of 128 outputs"):
        call(BY_NAME["tiny"], "gpu")


def test_bad_input():
    x, weight, scale = jnp.zeros((2, 8)), jnp.zeros((3, 4), jnp.int8), jnp.ones(3)
    with pytest.raises(
        ValueError,
        match=r"x must have the 4 inputs of weight .* with 8-bit codes, got the shape \(2, 8\)",
    ):
        quantized_matmul(x, weight, scale)
    with pytest.raises(ValueError, match=r"bits must be one of \(1, 2, 4, 8\), got 3"):
        quantized_matmul(x, weight, scale, bits=3)
    with pytest.raises(
        ValueError,
        match="at most 132104 inputs, got 262144: the sum of more products of codes may overflow",
    ):
        jax.eval_shape(
            quantized_matmul,
            jax.ShapeDtypeStruct((1, 2**18), jnp.float32),
            jax.ShapeDtypeStruct((1, 2**18), jnp.int8),
            jnp.ones(1),
        )
