"""Programs of this op for ``python -m kernels_pallas.aot``: the kernel, and plain jnp for comparison."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from kernels_pallas.aot import Program
from kernels_pallas.top_k_gating.api import top_k_gating
from kernels_pallas.top_k_gating.shapes import Shape, with_tag


def _lower(shape: Shape, implementation: Any, devices: Sequence[Any]) -> Any:
    def run(logits, used):
        return top_k_gating(logits, shape.k, used, normalize=True, implementation=implementation)

    return jax.jit(run).lower(*shape.abstract(SingleDeviceSharding(devices[0])))


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
