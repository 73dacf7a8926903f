"""Programs of this op for ``python -m kernels_pallas.aot``, on one device and on eight."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas.aot import Program
from kernels_pallas.cross_entropy.api import cross_entropy
from kernels_pallas.cross_entropy.shapes import Shape, with_tag


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
    return _gradient(implementation).lower(*shape.abstract(SingleDeviceSharding(devices[0])))


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
