"""Programs of these ops for ``python -m kernels_pallas.aot``: gated experts, by the kernels and in plain jnp."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from kernels_pallas.aot import Program
from kernels_pallas.expert_matmul.api import gather_matmul, matmul_scatter
from kernels_pallas.expert_matmul.shapes import Operands, Shape, with_tag


def experts(operands: Operands, implementation: Any) -> jax.Array:
    """Apply the experts to their tokens."""
    o, by = operands, {"implementation": implementation}
    inputs = (o.x, o.up, o.sizes, o.token_of_row, o.up_bias, o.gate, o.gate_bias)
    h = gather_matmul(*inputs, activation=jax.nn.silu, **by)
    inputs = (h, o.down, o.sizes, o.token_of_row, o.scale, o.down_bias)
    return matmul_scatter(*inputs, num_tokens=o.x.shape[0], **by)


def _lower(shape: Shape, implementation: Any, devices: Sequence[Any]) -> Any:
    operands = shape.abstract(SingleDeviceSharding(devices[0]))
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
