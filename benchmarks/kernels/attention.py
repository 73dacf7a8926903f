"""Shapes of ``attention`` for the tests, the benchmarks and ahead-of-time compilation, and the programs to compile."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from kernels_pallas.aot import Program
from kernels_pallas.attention.alibi import Alibi
from kernels_pallas.attention.api import attention


class Operands(NamedTuple):
    """Array arguments of ``attention``, or their types."""

    query: Float[Array, "batch heads seq head_dim"]
    keys: Float[Array, "batch kv_heads seq head_dim"]
    values: Float[Array, "batch kv_heads seq head_dim"]
    segments: Int[Array, "batch seq"] | None
    positions: Int[Array, "batch seq"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One named problem size."""

    name: str
    batch: int
    heads: int
    seq: int
    head_dim: int
    kv_heads: int | None = None
    """Key and value heads; None: the same number as ``heads``."""
    causal: bool = True
    packed: bool = True
    """Whether rows contain several segments and padding."""
    alibi: bool = False
    dtype: str = "bfloat16"
    tags: frozenset[str] = frozenset()
    """What the shape is used for: "test", "aot"."""

    def operands(self, key: Array) -> Operands:
        """Return random operands; if packed, segments of unequal length and padding at the end of each row but the last."""
        keys = jax.random.split(key, 3)
        types = self.abstract()
        scale = self.head_dim**-0.5
        query, *others = (
            jax.random.normal(key, x.shape).astype(x.dtype)
            for key, x in zip(keys, types[:3], strict=True)
        )
        starts = np.linspace(0, self.seq, 4).astype(int)[:3] + 5 * np.arange(3)
        segments = 1 + (np.arange(self.seq)[:, None] >= starts[1:]).sum(1)
        segments = np.tile(segments, (self.batch, 1))
        segments[:-1, self.seq - self.seq // 8 :] = -1
        positions = np.arange(self.seq)[None] - np.where(segments > 0, starts[segments - 1], 0)
        if not self.packed:
            positions = np.arange(self.seq)[None]
        return Operands(
            query * scale,
            *others,
            segments=jnp.asarray(segments, jnp.int32) if self.packed else None,
            positions=jnp.asarray(positions, jnp.int32) if self.alibi else None,
        )

    def abstract(self) -> Operands:
        """Return the types of the operands, for compilation without memory."""

        def array(*shape: int, dtype: Any = self.dtype) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype)

        tokens = array(self.batch, self.seq, dtype=jnp.int32)
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        return Operands(
            array(self.batch, self.heads, self.seq, self.head_dim),
            array(self.batch, kv_heads, self.seq, self.head_dim),
            array(self.batch, kv_heads, self.seq, self.head_dim),
            segments=tokens if self.packed else None,
            positions=tokens if self.alibi else None,
        )

    def bias(self, positions: Any) -> Alibi | None:
        """Return the ALiBi bias at the operands' positions, with slopes from 1/2 down that bfloat16 cannot represent."""
        if positions is None:
            return None
        slopes = 2.0 ** (-8 / self.heads * np.arange(1, self.heads + 1))
        return Alibi(slopes.astype(np.float32), positions)

    def flops(self) -> int:
        """Floating-point operations of two products forward and five backward, half of them if causal."""
        products = 14 * self.batch * self.heads * self.seq**2 * self.head_dim
        return products // 2 if self.causal else products

    def scores(self) -> str:
        """A regular expression that matches arrays whose last two dimensions are a quarter of the sequence or more."""
        part = "|".join(str(self.seq * quarters // 4) for quarters in range(1, 5))
        return rf"\b\w+\[(?:\d+,)+(?:{part}),(?:{part})\]"


def _tags(*names: str) -> frozenset[str]:
    return frozenset(names)


SHAPES: tuple[Shape, ...] = (
    Shape(
        name="bidirectional",
        batch=2,
        heads=2,
        seq=128,
        head_dim=8,
        causal=False,
        tags=_tags("test"),
    ),
    Shape(
        name="groups-alibi",
        batch=2,
        heads=4,
        kv_heads=2,
        seq=256,
        head_dim=8,
        alibi=True,
        dtype="float32",
        tags=_tags("test"),
    ),
    Shape(
        name="alibi-bf16", batch=2, heads=3, seq=256, head_dim=16, alibi=True, tags=_tags("test")
    ),
    Shape(name="gpt2", batch=32, heads=12, seq=1024, head_dim=64, tags=_tags("aot")),
    Shape(name="bloom", batch=16, heads=112, seq=2048, head_dim=128, alibi=True, tags=_tags("aot")),
    Shape(
        name="llama3-8b", batch=8, heads=32, kv_heads=8, seq=4096, head_dim=128, tags=_tags("aot")
    ),
    Shape(
        name="wide-f32",
        batch=8,
        heads=4,
        seq=1536,
        head_dim=250,
        alibi=True,
        dtype="float32",
        tags=_tags("aot"),
    ),
)


def with_tag(tag: str) -> tuple[Shape, ...]:
    """Return the shapes that have a tag."""
    return tuple(shape for shape in SHAPES if tag in shape.tags)


TPUS = ("v5e", "v6e", "v5p")


def gradient(shape: Shape, **options: Any) -> Any:
    """Return a function that computes the op's sum and its gradients for the operands of a shape."""

    def total(query, keys, values, segments, positions):
        out = attention(
            query,
            keys,
            values,
            causal=shape.causal,
            segments=segments,
            alibi=shape.bias(positions),
            row_axes=("data",),
            head_axes=("tensor",),
            **options,
        )
        return out.astype(jnp.float32).sum()

    return jax.value_and_grad(total, (0, 1, 2))


def lower_on_eight(function: Any, shape: Shape, devices: Sequence[Any]) -> Any:
    """Lower a function of a shape's operands, with rows in four parts and heads in two."""
    mesh = Mesh(
        np.asarray(devices).reshape(4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2
    )

    def placed(x: Any) -> Any:
        spec = P("data", "tensor") if len(x.shape) == 4 else P("data")
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*jax.tree.map(placed, shape.abstract()))


def programs() -> list[Program]:
    """Return each shape tagged "aot", in the kernel of the target; none may contain an array of scores."""
    found = []
    for shape in with_tag("aot"):
        for name, targets in (("splash", TPUS), ("cudnn", ("h100",))):
            if name == "cudnn" and shape.dtype == "float32":
                continue
            # cuDNN is used only for rows with one segment.
            which = shape if name == "splash" else dataclasses.replace(shape, packed=False)
            function = gradient(which, implementation=name)
            program = Program(
                name=f"attention {shape.name} x8 {name}",
                lower=functools.partial(lower_on_eight, function, which),
                flops=which.flops(),
                targets=targets,
                without=shape.scores(),
            )
            found.append(program)
    return found
