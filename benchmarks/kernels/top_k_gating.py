"""Shapes of ``top_k_gating`` for the tests, the benchmarks and ahead-of-time compilation, and the programs to compile."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import make_single_device_sharding
from jaxtyping import Array, Bool, Float

from kernels_pallas.aot import Program
from kernels_pallas.top_k_gating.api import top_k_gating


class Operands(NamedTuple):
    """Array arguments of ``top_k_gating``, or their types."""

    logits: Float[Array, "tokens experts"]
    used: Bool[Array, " tokens"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One named problem size."""

    name: str
    tokens: int
    experts: int
    k: int
    padding: bool = False
    """Whether some tokens are padding."""
    favorite: int | None = None
    """An expert that every token prefers."""
    levels: int | None = None
    """Number of different logits: a small number makes ties."""
    tags: frozenset[str] = frozenset()
    """What the shape is used for: "test", "aot"."""

    def operands(self, key: Array) -> Operands:
        """Return random operands."""
        keys = jax.random.split(key, 2)
        logits = 2 * jax.random.normal(keys[0], (self.tokens, self.experts))
        if self.levels is not None:
            logits = jnp.clip(jnp.round(logits), 0, self.levels - 1)
        if self.favorite is not None:
            logits = logits.at[:, self.favorite].set(100.0)
        used = jax.random.bernoulli(keys[1], 0.7, (self.tokens,)) if self.padding else None
        return Operands(logits, used)

    def abstract(self, sharding: Any = None) -> Operands:
        """Return the types of the operands, for compilation without memory."""

        def array(dtype: Any, *shape: int) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        used = array(jnp.bool_, self.tokens) if self.padding else None
        return Operands(array(jnp.float32, self.tokens, self.experts), used)


def _tags(*names: str) -> frozenset[str]:
    return frozenset(names)


SHAPES: tuple[Shape, ...] = (
    Shape(name="one", tokens=1, experts=1, k=1, tags=_tags("test")),
    Shape(name="tiny", tokens=5, experts=3, k=2, tags=_tags("test")),
    Shape(name="all experts", tokens=9, experts=4, k=4, tags=_tags("test")),
    Shape(name="odd", tokens=301, experts=60, k=4, padding=True, tags=_tags("test")),
    Shape(name="tiles", tokens=512, experts=16, k=1, tags=_tags("test")),
    Shape(name="favorite", tokens=300, experts=12, k=2, favorite=7, tags=_tags("test")),
    Shape(name="ties", tokens=260, experts=9, k=3, levels=2, padding=True, tags=_tags("test")),
    # The routers of Mixtral 8x7B, OLMoE and Qwen3-30B-A3B, in decoding and in reading a prompt.
    Shape(name="mixtral 8", tokens=8, experts=8, k=2, tags=_tags("aot")),
    Shape(name="olmoe 64", tokens=64, experts=64, k=8, padding=True, tags=_tags("aot")),
    Shape(name="qwen2 256", tokens=256, experts=60, k=4, padding=True, tags=_tags("aot")),
    Shape(name="qwen3 4096", tokens=4096, experts=128, k=8, padding=True, tags=_tags("aot")),
)


def with_tag(tag: str) -> tuple[Shape, ...]:
    """Return the shapes that have a tag."""
    return tuple(shape for shape in SHAPES if tag in shape.tags)


def _lower(shape: Shape, implementation: Any, devices: Sequence[Any]) -> Any:
    def run(logits, used):
        return top_k_gating(logits, shape.k, used, normalize=True, implementation=implementation)

    return jax.jit(run).lower(*shape.abstract(make_single_device_sharding(devices[0])))


def programs() -> list[Program]:
    """Return each shape tagged "aot", in the TPU kernel and in plain jnp for all targets."""
    return [
        Program(
            name=f"top_k_gating {shape.name} {implementation}",
            lower=functools.partial(_lower, shape, implementation),
            targets=targets,
        )
        for shape in with_tag("aot")
        for implementation, targets in (
            ("tpu", ("v5e", "v6e")),
            ("reference", ("v5e", "v6e", "h100")),
        )
    ]
