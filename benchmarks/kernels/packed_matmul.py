"""Shapes of ``packed_matmul`` for the tests, the benchmarks and ahead-of-time compilation, and the programs to compile."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import make_single_device_sharding
from jaxtyping import Array, Float, Int8

from kernels_pallas.aot import Program
from kernels_pallas.packed_matmul import gpu
from kernels_pallas.packed_matmul.api import packed_matmul


class Operands(NamedTuple):
    """Arguments of ``packed_matmul``, or their types."""

    x: Float[Array, "rows d_in"]
    weight: Int8[Array, "d_out bytes"]
    scale: Float[Array, "groups d_out"]
    zero: Float[Array, "groups d_out"] | None
    bias: Float[Array, " d_out"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One named problem size."""

    name: str
    rows: int
    d_in: int
    d_out: int
    bits: int
    """Number of bits per code of the weight."""
    groups: int = 1
    with_zero: bool = False
    dtype: str = "float32"
    """Dtype of ``x``."""
    tags: frozenset[str] = frozenset()
    """What the shape is used for: "test", "gpu test", "bench", "aot"."""

    def operands(self, key: Array) -> Operands:
        """Return random operands."""
        keys = jax.random.split(key, 5)
        size = (self.d_out, self.d_in * self.bits // 8)
        of_groups = (self.groups, self.d_out)
        return Operands(
            x=jax.random.normal(keys[0], (self.rows, self.d_in)).astype(self.dtype),
            weight=jax.lax.bitcast_convert_type(jax.random.bits(keys[1], size, jnp.uint8), "int8"),
            scale=jax.random.uniform(keys[2], of_groups) / (2**self.bits * self.d_in**0.5),
            zero=jax.random.normal(keys[3], of_groups) / self.d_in if self.with_zero else None,
            bias=jax.random.normal(keys[4], (self.d_out,)).astype(self.dtype),
        )

    def abstract(self, sharding: Any = None) -> Operands:
        """Return the types of the operands, for compilation without memory."""

        def array(*shape: int, dtype: Any = jnp.float32) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        of_groups = array(self.groups, self.d_out)
        return Operands(
            x=array(self.rows, self.d_in, dtype=self.dtype),
            weight=array(self.d_out, self.d_in * self.bits // 8, dtype=jnp.int8),
            scale=of_groups,
            zero=of_groups if self.with_zero else None,
            bias=array(self.d_out, dtype=self.dtype),
        )

    def moved(self) -> int:
        """Minimum memory traffic in bytes: each operand read once, the result written once."""
        operands = self.abstract()
        sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(operands)]
        return sum(sizes) + self.rows * self.d_out * operands.x.dtype.itemsize


def _tags(*names: str) -> frozenset[str]:
    return frozenset(names)


SHAPES: tuple[Shape, ...] = (
    Shape(name="channel-8", rows=5, d_in=64, d_out=24, bits=8, tags=_tags("test")),
    Shape(
        name="narrow-4",
        rows=3,
        d_in=576,
        d_out=40,
        bits=4,
        groups=18,
        with_zero=True,
        tags=_tags("test"),
    ),
    Shape(
        name="wide-2",
        rows=9,
        d_in=1024,
        d_out=136,
        bits=2,
        groups=8,
        dtype="bfloat16",
        tags=_tags("test"),
    ),
    Shape(name="channel-1", rows=2, d_in=144, d_out=24, bits=1, with_zero=True, tags=_tags("test")),
    Shape(
        name="hopper-4",
        rows=11,
        d_in=512,
        d_out=128,
        bits=4,
        groups=4,
        with_zero=True,
        dtype="bfloat16",
        tags=_tags("gpu test"),
    ),
    Shape(
        name="hopper-1",
        rows=5,
        d_in=512,
        d_out=128,
        bits=1,
        dtype="bfloat16",
        tags=_tags("gpu test"),
    ),
    Shape(
        name="7b-4-g128",
        rows=8,
        d_in=4096,
        d_out=4096,
        bits=4,
        groups=32,
        dtype="bfloat16",
        tags=_tags("bench", "aot"),
    ),
    Shape(
        name="7b-4-g32-zero",
        rows=8,
        d_in=4096,
        d_out=4096,
        bits=4,
        groups=128,
        with_zero=True,
        dtype="bfloat16",
        tags=_tags("bench", "aot"),
    ),
    *(
        Shape(
            name=f"7b-{bits}",
            rows=8,
            d_in=4096,
            d_out=4096,
            bits=bits,
            dtype="bfloat16",
            tags=_tags("bench", "aot"),
        )
        for bits in (8, 4, 2, 1)
    ),
)


def with_tag(tag: str) -> tuple[Shape, ...]:
    """Return the shapes that have a tag."""
    return tuple(shape for shape in SHAPES if tag in shape.tags)


def _lower(shape: Shape, implementation: Any, devices: Sequence[Any]) -> Any:
    function = functools.partial(packed_matmul, bits=shape.bits, implementation=implementation)
    return jax.jit(function).lower(*shape.abstract(make_single_device_sharding(devices[0])))


def programs() -> list[Program]:
    """Return each shape tagged "aot", in the target's kernel and in plain jnp."""
    found = []
    for shape in with_tag("aot"):
        x, weight, *_ = shape.abstract()
        for kernel, targets in (("tpu", ("v5e", "v6e")), ("gpu", ("h100",))):
            for implementation in (kernel, "reference"):
                if implementation == "gpu" and gpu.why_not(x, weight, shape.groups, shape.bits):
                    continue
                program = Program(
                    name=f"packed_matmul {shape.name} {implementation}",
                    lower=functools.partial(_lower, shape, implementation),
                    targets=targets,
                )
                found.append(program)
    return found
