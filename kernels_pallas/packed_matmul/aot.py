"""Programs of this op for ``python -m kernels_pallas.aot``: the kernels, and plain jnp for comparison."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from kernels_pallas.aot import Program
from kernels_pallas.packed_matmul import gpu
from kernels_pallas.packed_matmul.api import packed_matmul
from kernels_pallas.packed_matmul.shapes import Shape, with_tag


def _lower(shape: Shape, implementation: Any, devices: Sequence[Any]) -> Any:
    function = functools.partial(packed_matmul, bits=shape.bits, implementation=implementation)
    return jax.jit(function).lower(*shape.abstract(SingleDeviceSharding(devices[0])))


def programs() -> list[Program]:
    """Return each shape tagged "aot", in the target's kernel and in plain jnp."""
    found = []
    for shape in with_tag("aot"):
        x, weight, *_ = shape.abstract()
        for kernel, targets in (("tpu", ("v5e", "v6e")), ("gpu", ("h100",))):
            for implementation in (kernel, "reference"):
                if implementation == "gpu" and gpu.why_not(x, weight, shape.groups, shape.bits):
                    continue
                program = Program(
                    name=f"packed_matmul {shape.name} {implementation}",
                    lower=functools.partial(_lower, shape, implementation),
                    targets=targets,
                )
                found.append(program)
    return found
