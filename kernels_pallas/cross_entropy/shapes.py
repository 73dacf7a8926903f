"""The shapes that the tests, the benchmark and the ahead-of-time compilation share."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
