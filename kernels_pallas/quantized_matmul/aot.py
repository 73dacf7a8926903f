"""Programs of this op for ``python -m kernels_pallas.aot``: the kernels, and plain jnp for comparison."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from kernels_pallas.aot import Program
from kernels_pallas.quantized_matmul.api import quantized_matmul
from kernels_pallas.quantized_matmul.shapes import Shape, with_tag


def _lower(shape: Shape, implementation: Any, devices: Sequence[Any]) -> Any:
    function = functools.partial(
        quantized_matmul, bits=shape.bits, activation=jax.nn.silu, implementation=implementation
    )
    return jax.jit(function).lower(*shape.abstract(SingleDeviceSharding(devices[0])))


def programs() -> list[Program]:
    """Return each shape tagged "aot", in the target's kernel and in plain jnp."""
    found = []
    for shape in with_tag("aot"):
        for kernel, targets in (("tpu", ("v5e", "v6e")), ("gpu", ("h100",))):
            for implementation in (kernel, "reference"):
                if implementation == "gpu" and shape.bits != 8:
                    continue
                program = Program(
                    name=f"quantized_matmul {shape.name} {implementation}",
                    lower=functools.partial(_lower, shape, implementation),
                    flops=shape.operations(),
                    targets=targets,
                )
                found.append(program)
    return found
