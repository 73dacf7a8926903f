"""Shapes of ``cross_entropy`` for the tests, the benchmarks and ahead-of-time compilation, and the programs to compile."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, make_single_device_sharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from kernels_pallas.aot import Program
from kernels_pallas.cross_entropy.api import cross_entropy


class Operands(NamedTuple):
    """Arguments of ``cross_entropy``, or their types."""

    hidden: Float[Array, "tokens d"]
    vocab_weight: Float[Array, "vocab d"]
    bias: Float[Array, " vocab"]
    labels: Int[Array, " tokens"]
    weights: Float[Array, " tokens"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One named problem size."""

    name: str
    tokens: int
    d: int
    vocab: int
    dtype: str = "float32"
    """Dtype of ``hidden``; the vocabulary's weight is float32, like parameters."""
    tags: frozenset[str] = frozenset()
    """What the shape is used for: "test", "bench", "aot"."""

    def operands(self, key: Array) -> Operands:
        """Return random operands; of every eight tokens, one has the label -100 and one a confident prediction."""
        keys = jax.random.split(key, 6)
        weight = jax.random.normal(keys[0], (self.vocab, self.d)) * self.d**-0.5
        labels = jax.random.randint(keys[1], (self.tokens,), 0, self.vocab)
        hidden = jax.random.normal(keys[2], (self.tokens, self.d))
        kind = jnp.arange(self.tokens) % 8
        certain = 16.0 * weight[labels]
        return Operands(
            hidden=jnp.where((kind == 3)[:, None], certain, hidden).astype(self.dtype),
            vocab_weight=weight,
            bias=jax.random.normal(keys[3], (self.vocab,)),
            labels=jnp.where(kind == 5, -100, labels),
            weights=jax.random.uniform(keys[4], (self.tokens,), maxval=2.0),
        )

    def abstract(self, sharding: Any = None) -> Operands:
        """Return the types of the operands, for compilation without memory."""

        def array(*shape: int, dtype: Any = jnp.float32) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        return Operands(
            hidden=array(self.tokens, self.d, dtype=self.dtype),
            vocab_weight=array(self.vocab, self.d),
            bias=array(self.vocab),
            labels=array(self.tokens, dtype=jnp.int32),
            weights=array(self.tokens),
        )

    def flops(self) -> int:
        """Floating-point operations of the loss and both gradients: three matrix products."""
        return 6 * self.tokens * self.d * self.vocab


def _tags(*names: str) -> frozenset[str]:
    return frozenset(names)


SHAPES: tuple[Shape, ...] = (
    Shape(name="tiny", tokens=24, d=32, vocab=64, tags=_tags("test")),
    Shape(name="odd", tokens=131, d=40, vocab=333, tags=_tags("test")),
    Shape(name="odd-bf16", tokens=131, d=40, vocab=333, dtype="bfloat16", tags=_tags("test")),
    Shape(name="tiles", tokens=256, d=128, vocab=1024, tags=_tags("test")),
    Shape(name="edges-bf16", tokens=150, d=128, vocab=1100, dtype="bfloat16", tags=_tags("test")),
    Shape(name="demo", tokens=2048, d=256, vocab=8192, tags=_tags("bench", "aot")),
    Shape(name="demo-bf16", tokens=2048, d=256, vocab=8192, dtype="bfloat16", tags=_tags("bench")),
    Shape(name="gpt2-short", tokens=512, d=768, vocab=50257, tags=_tags("bench")),
    Shape(name="gpt2", tokens=8192, d=768, vocab=50257, dtype="bfloat16", tags=_tags("aot")),
    Shape(name="llama-7b", tokens=4096, d=4096, vocab=32000, dtype="bfloat16", tags=_tags("aot")),
    Shape(name="bloom-7b1", tokens=8192, d=4096, vocab=250880, dtype="bfloat16", tags=_tags("aot")),
)


def with_tag(tag: str) -> tuple[Shape, ...]:
    """Return the shapes that have a tag."""
    return tuple(shape for shape in SHAPES if tag in shape.tags)


def _gradient(implementation: Any, token_axes: Sequence[str] = ()) -> Any:
    def loss(hidden, vocab_weight, bias, labels, weights):
        return cross_entropy(
            hidden,
            vocab_weight,
            labels,
            weights=weights,
            bias=bias,
            z_loss=1e-4,
            token_axes=token_axes,
            implementation=implementation,
        )

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))


def _on_one(shape: Shape, implementation: Any, devices: Sequence[Any]) -> Any:
    return _gradient(implementation).lower(*shape.abstract(make_single_device_sharding(devices[0])))


def _on_eight(shape: Shape, token_axes: Sequence[str], devices: Sequence[Any]) -> Any:
    """Lower with tokens divided over eight devices and the weight on each; the op chooses the implementation."""
    mesh = Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))
    specs = P("data"), P(), P(), P("data"), P("data")
    types = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        for x, spec in zip(shape.abstract(), specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        return _gradient(None, token_axes).lower(*types)


def programs() -> list[Program]:
    """Return each shape tagged "aot", in the target's kernel and in the chunked form for comparison."""
    found = []
    for shape in with_tag("aot"):
        for kernel, targets in (("tpu", ("v5e", "v6e")), ("gpu", ("h100",))):
            for implementation in (kernel, "chunked"):
                program = Program(
                    name=f"cross_entropy {shape.name} {implementation}",
                    lower=functools.partial(_on_one, shape, implementation),
                    flops=shape.flops(),
                    targets=targets,
                )
                found.append(program)
    shape = next(shape for shape in with_tag("aot") if shape.name == "gpt2")
    for label, axes in (("token_axes", ("data",)), ("compiler's partition", ())):
        program = Program(
            name=f"cross_entropy {shape.name} x8 {label}",
            lower=functools.partial(_on_eight, shape, axes),
            flops=shape.flops(),
        )
        found.append(program)
    return found
