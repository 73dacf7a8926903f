"""Shapes of ``expert_matmul`` for the tests, the benchmarks and ahead-of-time compilation, and the programs to compile."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import make_single_device_sharding
from jaxtyping import Array, Float, Int

from kernels_pallas.aot import Program
from kernels_pallas.expert_matmul.api import gather_matmul, matmul_scatter

Load = Literal["random", "one", "nobody"]


class Operands(NamedTuple):
    """A layer of gated experts and its tokens, or their types."""

    x: Float[Array, "tokens d_model"]
    up: Float[Array, "experts d_model d_ff"]
    gate: Float[Array, "experts d_model d_ff"]
    down: Float[Array, "experts d_ff d_model"]
    up_bias: Float[Array, "experts d_ff"] | None
    gate_bias: Float[Array, "experts d_ff"] | None
    down_bias: Float[Array, "experts d_model"] | None
    sizes: Int[Array, " experts"]
    token_of_row: Int[Array, " rows"]
    scale: Float[Array, " rows"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One named problem size."""

    name: str
    tokens: int
    experts: int
    k: int
    d_model: int
    d_ff: int
    bias: bool = False
    load: Load = "random"
    """How tokens choose experts; "one": all tokens choose the last expert; "nobody": all tokens are padding."""
    padding: int = 0
    """Number of tokens that are padding."""
    dtype: str = "float32"
    tags: frozenset[str] = frozenset()
    """What the shape is used for: "test", "aot", and "edge", for which only the kernels are compiled."""

    def operands(self, key: Array) -> Operands:
        """Return random operands; rows of padding come last, with values that must not matter."""
        keys = iter(jax.random.split(key, 9))
        normal = lambda *shape: jax.random.normal(next(keys), shape).astype(self.dtype)
        experts = jax.random.randint(next(keys), (self.tokens, self.k), 0, self.experts)
        if self.load == "one":
            experts = jnp.full_like(experts, self.experts - 1)
        real = 0 if self.load == "nobody" else self.tokens - self.padding
        experts = jnp.where((jnp.arange(self.tokens) < real)[:, None], experts, self.experts)
        flat = experts.reshape(-1)
        order = jnp.argsort(flat, stable=True)
        d, f, e = self.d_model, self.d_ff, self.experts
        weight = lambda d_in, d_out: normal(e, d_in, d_out) / d_in**0.5
        bias = lambda d_out: normal(e, d_out) if self.bias else None
        return Operands(
            x=normal(self.tokens, d),
            up=weight(d, f),
            gate=weight(d, f),
            down=weight(f, d),
            up_bias=bias(f),
            gate_bias=bias(f),
            down_bias=bias(d),
            sizes=(flat[:, None] == jnp.arange(e)[None]).sum(0, dtype=jnp.int32),
            token_of_row=(order // self.k).astype(jnp.int32),
            scale=jnp.where(flat[order] < e, jax.random.uniform(next(keys), order.shape), jnp.nan),
        )

    def abstract(self, sharding: Any = None) -> Operands:
        """Return the types of the operands, for compilation without memory."""
        found = jax.eval_shape(self.operands, jax.random.key(0))
        place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
        return jax.tree.map(place, found)

    def operations(self) -> int:
        """Multiplications and additions of the three products."""
        return 6 * self.tokens * self.k * self.d_model * self.d_ff


def _tags(*names: str) -> frozenset[str]:
    return frozenset(names)


def _test(name: str, **options: Any) -> Shape:
    return Shape(name=name, tags=_tags("test"), **options)


def _aot(name: str, **options: Any) -> Shape:
    return Shape(name=name, dtype="bfloat16", tags=_tags("aot"), **options)


MIXTRAL = {"experts": 8, "k": 2, "d_model": 4096, "d_ff": 14_336}
OLMOE = {"experts": 64, "k": 8, "d_model": 2048, "d_ff": 1024}
QWEN3 = {"experts": 128, "k": 8, "d_model": 2048, "d_ff": 768}

SHAPES: tuple[Shape, ...] = (
    _test("one token", tokens=1, experts=4, k=2, d_model=16, d_ff=24, bias=True),
    _test("odd", tokens=7, experts=5, k=3, d_model=40, d_ff=72, bias=True, padding=2),
    _test("one has all", tokens=150, experts=3, k=1, d_model=24, d_ff=40, load="one"),
    _test("nobody", tokens=9, experts=3, k=2, d_model=16, d_ff=16, bias=True, load="nobody"),
    _test("tiles", tokens=100, experts=6, k=4, d_model=64, d_ff=640, padding=3, dtype="bfloat16"),
    _test("many experts", tokens=20, experts=70, k=2, d_model=24, d_ff=16, bias=True),
    # Mixtral 8x7B, OLMoE and Qwen3-30B-A3B in decoding, and in prefill of a short prompt.
    _aot("mixtral 1", tokens=1, **MIXTRAL),
    _aot("mixtral 8", tokens=8, **MIXTRAL),
    _aot("mixtral 256", tokens=256, **MIXTRAL),
    _aot("olmoe 1", tokens=1, **OLMOE),
    _aot("olmoe 8", tokens=8, **OLMOE),
    _aot("olmoe 256", tokens=256, padding=3, **OLMOE),
    _aot("qwen3 1", tokens=1, **QWEN3),
    _aot("qwen3 8", tokens=8, **QWEN3),
    # The largest sizes that should fit in VMEM.
    Shape(name="mixtral 768", tokens=768, dtype="bfloat16", tags=_tags("edge"), **MIXTRAL),
    Shape(name="mixtral-f32 512", tokens=512, tags=_tags("edge"), **MIXTRAL),
    Shape(name="olmoe-f32 448", tokens=448, tags=_tags("edge"), **OLMOE),
    Shape(
        name="small 2048", tokens=2048, tags=_tags("edge"), experts=16, k=4, d_model=256, d_ff=1024
    ),
    Shape(
        name="odd-f32",
        tokens=7,
        experts=5,
        k=3,
        d_model=200,
        d_ff=392,
        bias=True,
        tags=_tags("aot"),
    ),
)


def with_tag(tag: str) -> tuple[Shape, ...]:
    """Return the shapes that have a tag."""
    return tuple(shape for shape in SHAPES if tag in shape.tags)


def experts(operands: Operands, implementation: Any) -> jax.Array:
    """Apply the experts to their tokens."""
    o, by = operands, {"implementation": implementation}
    inputs = (o.x, o.up, o.sizes, o.token_of_row, o.up_bias, o.gate, o.gate_bias)
    h = gather_matmul(*inputs, activation=jax.nn.silu, **by)
    inputs = (h, o.down, o.sizes, o.token_of_row, o.scale, o.down_bias)
    return matmul_scatter(*inputs, num_tokens=o.x.shape[0], **by)


def _lower(shape: Shape, implementation: Any, devices: Sequence[Any]) -> Any:
    operands = shape.abstract(make_single_device_sharding(devices[0]))
    return jax.jit(functools.partial(experts, implementation=implementation)).lower(operands)


def programs() -> list[Program]:
    """Return each shape tagged "aot", in the TPU kernels and in plain jnp for all targets; for those tagged "edge", only the kernels."""
    tpus = ("v5e", "v6e")
    chosen = [(shape, "tpu", tpus) for tag in ("aot", "edge") for shape in with_tag(tag)]
    chosen += [(shape, "reference", (*tpus, "h100")) for shape in with_tag("aot")]
    return [
        Program(
            name=f"expert_matmul {shape.name} {implementation}",
            lower=functools.partial(_lower, shape, implementation),
            flops=shape.operations(),
            targets=targets,
        )
        for shape, implementation, targets in chosen
    ]
