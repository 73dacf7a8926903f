"""The Pallas kernels, interpreted on the CPU, against the jnp form, which has NumPy as its own oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from benchmarks.kernels.sign_compress import SHAPES, Shape, with_tag
from kernels_pallas import sign_compress
from kernels_pallas.dispatch import Unsupported
from kernels_pallas.sign_compress import gpu, reference, tpu
from tests.kernels_pallas.support import A100, H100, lowered_for, named, needs_gpu_interpreter

SMALL = with_tag("test")
BY_NAME = {shape.name: shape for shape in SHAPES}


def check(found, expected):
    """Bits to the bit; sums as float32 allows, since compilers may fuse and order them."""
    for (bits, corrected, squares), (bits_, corrected_, squares_) in zip(
        found, expected, strict=True
    ):
        near = np.abs(np.asarray(corrected_)) < 1e-6
        np.testing.assert_allclose(corrected, corrected_, rtol=1e-6, atol=1e-6)
        assert bits.dtype == jnp.uint8
        differing = np.bitwise_xor(np.asarray(bits), np.asarray(bits_))
        undecided = np.packbits(near, axis=-2)[..., 0, :]
        assert not (differing & ~undecided).any()
        np.testing.assert_allclose(squares, squares_, rtol=1e-5)


def both(module, shape, key, **options):
    """What `compress` and, at the first and last server, `average` give.

    Each call is waited for: an interpreter calls back into Python, and hung when other work was dispatched meanwhile.
    """
    compress = jax.jit(functools.partial(module.compress, size=shape.size, **options))
    average = jax.jit(functools.partial(module.average, **options))
    calls = [(compress, shape.compressed(key))]
    calls += [(average, shape.averaged(key, server=place)) for place in (0, shape.workers - 1)]
    jax.block_until_ready([operands for _, operands in calls])
    return [jax.block_until_ready(call(*operands)) for call, operands in calls]


@named(SMALL)
def test_tpu_kernels(shape, getkey):
    key = getkey()
    check(both(tpu, shape, key, interpret=True), both(reference, shape, key))


def test_tpu_kernels_over_several_tiles(getkey, monkeypatch):
    monkeypatch.setattr(tpu, "_TILE_BYTES", 2**16)
    shape, key = BY_NAME["edges"], getkey()
    assert tpu._tile(shape.workers, shape.bytes) < shape.bytes // 2
    check(both(tpu, shape, key, interpret=True), both(reference, shape, key))


@named([BY_NAME["tiny"], BY_NAME["edges-bf16"]])
def test_tpu_kernels_with_the_memories_of_a_tpu(shape, getkey):
    """This interpreter starts memory as NaN and refuses reads out of bounds."""
    key, interpret = getkey(), pltpu.InterpretParams()
    check(both(tpu, shape, key, interpret=interpret), both(reference, shape, key))


def test_workers_of_a_vmap_have_kernels_of_their_own(getkey):
    shape = BY_NAME["tiny"]
    workers = [shape.compressed(key) for key in jax.random.split(getkey(), 3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *workers)
    call = functools.partial(tpu.compress, size=shape.size, interpret=True)
    found = jax.jit(jax.vmap(call))(*stacked)
    for i, one in enumerate(workers):
        expected = reference.compress(*one, size=shape.size)
        check([jax.tree.map(lambda x, i=i: x[i], found)], [expected])


def test_kernels_serve_within_a_shard_map(getkey):
    shape = BY_NAME["tiles"]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    workers = [shape.compressed(key) for key in jax.random.split(getkey(), 2)]
    stacked = jax.block_until_ready(jax.tree.map(lambda *x: jnp.stack(x), *workers))

    def one(operands):
        operands = jax.tree.map(lambda x: x[0], operands)
        found = sign_compress.compress(*operands, size=shape.size, implementation="tpu")
        return jax.tree.map(lambda x: x[None], found)

    run = jax.shard_map(one, in_specs=P("data"), out_specs=P("data"))
    with jax.set_mesh(mesh), pltpu.force_tpu_interpret_mode():
        found = jax.block_until_ready(jax.jit(run)(stacked))
    for i, one_worker in enumerate(workers):
        expected = reference.compress(*one_worker, size=shape.size)
        check([jax.tree.map(lambda x, i=i: x[i], found)], [expected])


def test_results_of_gpu_kernels_have_the_axes_of_their_operands():
    """Within a checked shard_map they stand in for the reference's, whose types say along which axes they differ."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    found = []

    def one(x, scale):
        compressed = gpu.compress(x, x, scale[0], size=x.size)
        averaged = gpu.average(compressed[0], scale, x[0], scale[0], jnp.int32(4096))
        found.extend(jax.typeof(a).manual_axis_type.varying for a in (*compressed, *averaged))
        return x

    run = jax.shard_map(one, in_specs=P("data"), out_specs=P("data"))
    with jax.set_mesh(mesh):
        jax.eval_shape(run, jnp.zeros((4, 8, 512)), jnp.zeros(4))
    assert found == [{"data"}] * 6


@needs_gpu_interpreter
@named([BY_NAME["edges-bf16"], BY_NAME["tiles"]])
def test_gpu_kernels(shape, getkey):
    key, interpret = getkey(), plgpu.InterpretGPUParams()
    check(both(gpu, shape, key, interpret=interpret), both(reference, shape, key))


def program(platform, name="tiles", implementation=None, device_kind=None):
    shape = BY_NAME[name]

    def run(compressed, averaged):
        return (
            sign_compress.compress(*compressed, size=shape.size, implementation=implementation),
            sign_compress.average(*averaged, implementation=implementation),
        )

    return lowered_for(platform, run, shape.abstract(), device_kind)


def test_each_platform_gets_its_own_kernels_from_one_host():
    """Where they serve; and a name is taken at its word."""
    assert "custom_call" not in program("cpu")
    assert program("tpu").count("@tpu_custom_call") == 2
    assert "tpu_custom_call" not in program("tpu", implementation="reference")
    assert "mosaic_gpu" in program("cuda", device_kind=H100)
    assert "mosaic_gpu" not in program("cuda", device_kind=A100)
    assert "mosaic_gpu" not in program("cuda", "tiny", device_kind=H100)
    with pytest.raises(ValueError, match="interpret mode"):
        program("cpu", implementation="tpu")


def test_a_named_kernel_that_cannot_serve_says_why():
    many = Shape(name="many", workers=1024, bytes=16, size=1)
    with pytest.raises(Unsupported, match="'tpu' is not supported here: a tile of 1024 workers"):
        jax.eval_shape(
            functools.partial(sign_compress.compress, size=1, implementation="tpu"),
            *many.abstract()[0],
        )
    with pytest.raises(Unsupported, match="'gpu' is not supported here: rows have 1300 bytes"):
        program("cuda", "edges", implementation="gpu")
    with pytest.raises(
        Unsupported, match="rows have 4 bytes of signs, and the kernel needs at least 512"
    ):
        program("cuda", "tiny", implementation="gpu")


def test_bytes_moved_are_those_of_the_operands_and_results():
    for shape in SHAPES:
        compressed, averaged = shape.abstract()
        size = lambda tree: sum(
            x.size * x.dtype.itemsize for x in jax.tree.leaves(tree) if x.ndim > 1
        )
        sent = jax.eval_shape(functools.partial(reference.compress, size=shape.size), *compressed)
        mean = jax.eval_shape(reference.average, *averaged)
        moved = size(compressed) + size(sent), size(averaged) + size(mean) + mean[0].size
        assert shape.moved() == moved
