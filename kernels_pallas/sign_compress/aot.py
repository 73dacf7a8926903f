"""Programs of this op for ``python -m kernels_pallas.aot``: both sides of the exchange, as kernels and in plain jnp."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from kernels_pallas.aot import Program
from kernels_pallas.sign_compress import api
from kernels_pallas.sign_compress.shapes import Shape, with_tag


def _compress(shape: Shape, implementation: Any, devices: Sequence[Any]) -> Any:
    types, _ = shape.abstract(SingleDeviceSharding(devices[0]))
    function = functools.partial(api.compress, size=shape.size, implementation=implementation)
    # The old sums are no longer needed, and the new ones replace them in memory.
    return jax.jit(function, donate_argnums=1).lower(*types)


def _average(shape: Shape, implementation: Any, devices: Sequence[Any]) -> Any:
    _, types = shape.abstract(SingleDeviceSharding(devices[0]))
    function = functools.partial(api.average, implementation=implementation)
    return jax.jit(function, donate_argnums=2).lower(*types)


def programs() -> list[Program]:
    """Return each shape tagged "aot", in the target's kernel and in plain jnp for comparison."""
    found = []
    for shape in with_tag("aot"):
        for kernel, targets in (("tpu", ("v5e", "v6e")), ("gpu", ("h100",))):
            for implementation in (kernel, "reference"):
                for name, lower in (("compress", _compress), ("average", _average)):
                    program = Program(
                        name=f"sign_compress {name} {shape.name} {implementation}",
                        lower=functools.partial(lower, shape, implementation),
                        targets=targets,
                    )
                    found.append(program)
    return found
