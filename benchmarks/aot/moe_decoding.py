"""The experts of a layer in decoding, with and without kernels, for ahead-of-time compilation.

``make aot`` compiles them, and fails if a TPU program with kernels still sorts, gathers or scatters outside of them.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from effscale.models import MLPConfig, build_context
from effscale.moe import MoEConfig, RouterConfig
from kernels_pallas.aot import Program

TPUS = ("v5e", "v6e")
PLAIN = r" (?:sort|scatter|gather)\(|ragged-dot"
"""Operations that the kernels replace."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A layer of gated experts and the number of rows that decode at the same time."""

    name: str
    rows: int
    d_model: int
    d_ff: int
    num_experts: int
    k: int

    def build(self) -> Any:
        """Return the layer, in bfloat16."""
        expert = MLPConfig(d_ff=self.d_ff, activation="silu", gated=True, bias=False)
        router = RouterConfig(k=self.k, normalize="chosen")
        moe = MoEConfig(num_experts=self.num_experts, expert=expert, router=router)
        layer = moe.build(self.d_model, std=0.02, out_std=0.02, rngs=nnx.Rngs(0))
        return jax.tree.map(lambda a: a.astype(jnp.bfloat16), layer)


MIXTRAL = {"d_model": 4096, "d_ff": 14_336, "num_experts": 8, "k": 2}
OLMOE = {"d_model": 2048, "d_ff": 1024, "num_experts": 64, "k": 8}
QWEN3 = {"d_model": 2048, "d_ff": 768, "num_experts": 128, "k": 8}

CASES = (
    Case(name="Mixtral 8x7B, 1 row", rows=1, **MIXTRAL),
    Case(name="Mixtral 8x7B, 8 rows", rows=8, **MIXTRAL),
    Case(name="OLMoE, 1 row", rows=1, **OLMOE),
    Case(name="OLMoE, 8 rows", rows=8, **OLMOE),
    Case(name="Qwen3-30B-A3B, 1 row", rows=1, **QWEN3),
    Case(name="Qwen3-30B-A3B, 8 rows", rows=8, **QWEN3),
)


def programs() -> list[Program]:
    """Return each case with and without kernels on TPUs, and with the default on an H100."""
    found = []
    for case in CASES:
        for name, with_kernels, targets in (
            ("kernels", True, TPUS),
            ("compiler", False, (*TPUS, "h100")),
        ):
            program = Program(
                name=f"experts of {case.name}, {name}",
                lower=functools.partial(lower_layer, case, with_kernels),
                targets=targets,
                without=PLAIN if with_kernels else None,
            )
            found.append(program)
    return found


def lower_layer(case: Case, with_kernels: bool, devices: Sequence[Any]) -> jax.stages.Lowered:
    """Lower the router and experts of one decoding step, on the first of the devices.

    Args:
        case: The layer.
        with_kernels: Whether to lower under a mesh of the accelerators; without one, kernels are not used.
        devices: The devices; the first one is used.
    """
    mesh = Mesh(np.asarray(devices[:1]), ("data",), axis_types=(AxisType.Auto,))
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, P()))

    def run(layer: Any, x: jax.Array) -> jax.Array:
        context = build_context(1, kind=None, head_dim=8, causal=True)
        return layer(x, dataclasses.replace(context, cached=True))[0]

    layer = jax.tree.map(place, jax.eval_shape(case.build))
    x = place(jax.ShapeDtypeStruct((case.rows, 1, case.d_model), jnp.bfloat16))
    if not with_kernels:
        return jax.jit(run).lower(layer, x)
    with jax.set_mesh(mesh):
        return jax.jit(run).lower(layer, x)
