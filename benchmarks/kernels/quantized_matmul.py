"""Shapes of ``quantized_matmul`` for the tests, the benchmarks and ahead-of-time compilation, and the programs to compile."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import make_single_device_sharding
from jaxtyping import Array, Float, Int8, Int32

from kernels_pallas.aot import Program
from kernels_pallas.packed_codes import unpack_planes
from kernels_pallas.quantized_matmul.api import quantized_matmul


class Operands(NamedTuple):
    """Arguments of ``quantized_matmul``, or their types."""

    x: Float[Array, "rows d_in"]
    weight: Int8[Array, "d_out bytes"]
    scale: Float[Array, " d_out"]
    bias: Float[Array, " d_out"]
    code_sums: Int32[Array, " d_out"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One named problem size."""

    name: str
    rows: int
    d_in: int
    d_out: int
    bits: int = 8
    """Number of bits per code of the weight."""
    zero_points: bool = False
    """Whether the rows of ``x`` have zero points."""
    dtype: str = "float32"
    """Dtype of ``x``."""
    tags: frozenset[str] = frozenset()
    """What the shape is used for: "test", "bench", "aot"."""

    def operands(self, key: Array) -> Operands:
        """Return random operands; the second row is zero."""
        keys = jax.random.split(key, 4)
        x = jax.random.normal(keys[0], (self.rows, self.d_in)).astype(self.dtype)
        size = (self.d_out, self.d_in * self.bits // 8)
        weight = jax.lax.bitcast_convert_type(jax.random.bits(keys[1], size, jnp.uint8), "int8")
        planes = unpack_planes(weight, self.bits)
        sums = jnp.sum(jnp.concatenate(planes, axis=1), 1, dtype=jnp.int32)
        return Operands(
            x=x.at[1:2].set(0),
            weight=weight,
            scale=jax.random.uniform(keys[2], (self.d_out,)) * self.d_in**-0.5,
            bias=jax.random.normal(keys[3], (self.d_out,)).astype(self.dtype),
            code_sums=sums if self.zero_points else None,
        )

    def abstract(self, sharding: Any = None) -> Operands:
        """Return the types of the operands, for compilation without memory."""

        def array(*shape: int, dtype: Any = jnp.float32) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        return Operands(
            x=array(self.rows, self.d_in, dtype=self.dtype),
            weight=array(self.d_out, self.d_in * self.bits // 8, dtype=jnp.int8),
            scale=array(self.d_out),
            bias=array(self.d_out, dtype=self.dtype),
            code_sums=array(self.d_out, dtype=jnp.int32) if self.zero_points else None,
        )

    def operations(self) -> int:
        """Multiplications and additions of the product."""
        return 2 * self.rows * self.d_in * self.d_out


def _tags(*names: str) -> frozenset[str]:
    return frozenset(names)


SHAPES: tuple[Shape, ...] = (
    Shape(name="tiny", rows=5, d_in=64, d_out=24, tags=_tags("test")),
    Shape(name="odd-4", rows=7, d_in=72, d_out=40, bits=4, tags=_tags("test")),
    Shape(
        name="edges-2", rows=40, d_in=192, d_out=300, bits=2, dtype="bfloat16", tags=_tags("test")
    ),
    Shape(name="zeros-odd", rows=7, d_in=72, d_out=40, zero_points=True, tags=_tags("test")),
    Shape(
        name="zeros-4", rows=40, d_in=192, d_out=300, bits=4, zero_points=True, tags=_tags("test")
    ),
    Shape(
        name="zeros",
        rows=130,
        d_in=256,
        d_out=384,
        zero_points=True,
        dtype="bfloat16",
        tags=_tags("test"),
    ),
    Shape(name="odd-1", rows=3, d_in=144, d_out=24, bits=1, tags=_tags("test")),
    Shape(name="tiles", rows=130, d_in=256, d_out=384, dtype="bfloat16", tags=_tags("test")),
    Shape(name="bert-up", rows=1024, d_in=768, d_out=3072, tags=_tags("bench")),
    Shape(
        name="bert-up-bf16",
        rows=1024,
        d_in=768,
        d_out=3072,
        dtype="bfloat16",
        tags=_tags("bench", "aot"),
    ),
    Shape(
        name="bert-up-bf16-zeros",
        rows=1024,
        d_in=768,
        d_out=3072,
        zero_points=True,
        dtype="bfloat16",
        tags=_tags("bench", "aot"),
    ),
    Shape(
        name="bert-down-bf16", rows=1024, d_in=3072, d_out=768, dtype="bfloat16", tags=_tags("aot")
    ),
    Shape(
        name="llama-7b-down-bf16",
        rows=2048,
        d_in=11_008,
        d_out=4096,
        dtype="bfloat16",
        tags=_tags("aot"),
    ),
    Shape(
        name="llama-7b-down-4",
        rows=16,
        d_in=11_008,
        d_out=4096,
        bits=4,
        dtype="bfloat16",
        tags=_tags("bench", "aot"),
    ),
    Shape(
        name="llama-7b-down-2",
        rows=16,
        d_in=11_008,
        d_out=4096,
        bits=2,
        dtype="bfloat16",
        tags=_tags("aot"),
    ),
    Shape(
        name="llama-7b-down-1",
        rows=16,
        d_in=11_008,
        d_out=4096,
        bits=1,
        dtype="bfloat16",
        tags=_tags("aot"),
    ),
)


def with_tag(tag: str) -> tuple[Shape, ...]:
    """Return the shapes that have a tag."""
    return tuple(shape for shape in SHAPES if tag in shape.tags)


def _lower(shape: Shape, implementation: Any, devices: Sequence[Any]) -> Any:
    function = functools.partial(
        quantized_matmul, bits=shape.bits, activation=jax.nn.silu, implementation=implementation
    )
    return jax.jit(function).lower(*shape.abstract(make_single_device_sharding(devices[0])))


def programs() -> list[Program]:
    """Return each shape tagged "aot", in the target's kernel and in plain jnp."""
    found = []
    for shape in with_tag("aot"):
        for kernel, targets in (("tpu", ("v5e", "v6e")), ("gpu", ("h100",))):
            for implementation in (kernel, "reference"):
                if implementation == "gpu" and shape.bits != 8:
                    continue
                program = Program(
                    name=f"quantized_matmul {shape.name} {implementation}",
                    lower=functools.partial(_lower, shape, implementation),
                    flops=shape.operations(),
                    targets=targets,
                )
                found.append(program)
    return found
