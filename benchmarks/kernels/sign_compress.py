"""Shapes of ``sign_compress`` for the tests, the benchmarks and ahead-of-time compilation, and the programs to compile."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import make_single_device_sharding
from jaxtyping import Array, Float, Int, UInt8

from kernels_pallas.aot import Program
from kernels_pallas.sign_compress import api


class Compressed(NamedTuple):
    """Arguments of ``compress``, or their types."""

    x: Float[Array, "workers 8 bytes"]
    corrected: Float[Array, "workers 8 bytes"]
    scale: Float[Array, ""]


class Averaged(NamedTuple):
    """Arguments of ``average``, or their types."""

    bits: UInt8[Array, "workers bytes"]
    scales: Float[Array, " workers"]
    corrected: Float[Array, "8 bytes"]
    scale: Float[Array, ""]
    size: Int[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A tensor of one worker: the bytes of signs for each server, and the number of servers."""

    name: str
    workers: int
    bytes: int
    size: int
    """Number of elements that count."""
    dtype: str = "float32"
    """Dtype of ``x``."""
    tags: frozenset[str] = frozenset()
    """What the shape is used for: "test", "bench", "aot"."""

    def compressed(self, key: Array) -> Compressed:
        """Return random arguments of ``compress``; some of the sums are zero."""
        keys = jax.random.split(key, 2)
        block = (self.workers, 8, self.bytes)
        x = jax.random.normal(keys[0], block).astype(self.dtype)
        zero = jnp.arange(x.size).reshape(block) % 7 == 3
        last = jax.random.normal(keys[1], block)
        exact = jnp.float32(0.5) - x.astype(jnp.float32)  # positive here: the error is this - 0.5
        last = jnp.where(zero & (exact >= 0), exact, last)
        return Compressed(x, last, jnp.float32(0.5))

    def averaged(self, key: Array, server: int = 0) -> Averaged:
        """Return random arguments of ``average``, at one of the servers."""
        keys = jax.random.split(key, 3)
        part = 8 * self.bytes
        return Averaged(
            bits=jax.random.bits(keys[0], (self.workers, self.bytes), jnp.uint8),
            scales=jax.random.uniform(keys[1], (self.workers,), minval=0.1, maxval=2.0),
            corrected=jax.random.normal(keys[2], (8, self.bytes)),
            scale=jnp.float32(0.7),
            size=jnp.int32(min(max(self.size - server * part, 0), part)),
        )

    def abstract(self, sharding: Any = None) -> tuple[Compressed, Averaged]:
        """Return the types of both functions' arguments, for compilation without memory."""

        def array(*shape: int, dtype: Any = jnp.float32) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        block = (self.workers, 8, self.bytes)
        compressed = Compressed(array(*block, dtype=self.dtype), array(*block), array())
        averaged = Averaged(
            bits=array(self.workers, self.bytes, dtype=jnp.uint8),
            scales=array(self.workers),
            corrected=array(8, self.bytes),
            scale=array(),
            size=array(dtype=jnp.int32),
        )
        return compressed, averaged

    def moved(self) -> tuple[int, int]:
        """Minimum memory traffic of ``compress`` and ``average`` in bytes: each operand read once, each result written once."""
        part, itemsize = 8 * self.bytes, jnp.dtype(self.dtype).itemsize
        compressed = self.workers * (part * (itemsize + 4 + 4) + self.bytes)
        averaged = self.workers * self.bytes + part * (4 + 4) + self.bytes
        return compressed, averaged


def _tags(*names: str) -> frozenset[str]:
    return frozenset(names)


SHAPES = (
    Shape(name="tiny", workers=3, bytes=4, size=81, tags=_tags("test")),
    Shape(name="edges", workers=4, bytes=1300, size=41_000, tags=_tags("test")),
    Shape(
        name="edges-bf16", workers=5, bytes=1168, size=46_000, dtype="bfloat16", tags=_tags("test")
    ),
    Shape(name="tiles", workers=2, bytes=2048, size=32_768, tags=_tags("test")),
    Shape(name="16M", workers=4, bytes=2**19, size=2**24, tags=_tags("bench", "aot")),
    Shape(
        name="16M-bf16", workers=4, bytes=2**19, size=2**24, dtype="bfloat16", tags=_tags("bench")
    ),
    # BERT-Large's word embeddings among 64 workers, and all of a 1.5-billion-parameter GPT among 256.
    Shape(name="bert-large-words", workers=64, bytes=61_056, size=30_522 * 1024, tags=_tags("aot")),
    Shape(name="gpt2-1.5b-mlp", workers=256, bytes=240_000, size=491_520_000, tags=_tags("aot")),
)


def with_tag(tag: str) -> tuple[Shape, ...]:
    """Return the shapes that have a tag."""
    return tuple(shape for shape in SHAPES if tag in shape.tags)


def _compress(shape: Shape, implementation: Any, devices: Sequence[Any]) -> Any:
    types, _ = shape.abstract(make_single_device_sharding(devices[0]))
    function = functools.partial(api.compress, size=shape.size, implementation=implementation)
    # The old sums are no longer needed, and the new ones replace them in memory.
    return jax.jit(function, donate_argnums=1).lower(*types)


def _average(shape: Shape, implementation: Any, devices: Sequence[Any]) -> Any:
    _, types = shape.abstract(make_single_device_sharding(devices[0]))
    function = functools.partial(api.average, implementation=implementation)
    return jax.jit(function, donate_argnums=2).lower(*types)


def programs() -> list[Program]:
    """Return each shape tagged "aot", in the target's kernel and in plain jnp for comparison."""
    found = []
    for shape in with_tag("aot"):
        for kernel, targets in (("tpu", ("v5e", "v6e")), ("gpu", ("h100",))):
            for implementation in (kernel, "reference"):
                for name, lower in (("compress", _compress), ("average", _average)):
                    program = Program(
                        name=f"sign_compress {name} {shape.name} {implementation}",
                        lower=functools.partial(lower, shape, implementation),
                        targets=targets,
                    )
                    found.append(program)
    return found
