"""Programs of this op for ``python -m kernels_pallas.aot``: the kernels with gradients, on eight devices."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas.aot import Program
from kernels_pallas.attention.api import attention
from kernels_pallas.attention.shapes import Shape, with_tag

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
