"""What tests of several kernels share: their shapes, codes of packed bytes in NumPy, machines that programs are lowered for."""

import functools

import jax
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractMesh, AxisType

H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"
needs_gpu_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason=f"jax {jax.__version__} has no interpreter for Mosaic GPU kernels; jax 0.12 has",
)
named = functools.partial(pytest.mark.parametrize, "shape", ids=lambda shape: shape.name)


def codes_of(packed, bits):
    """Codes of rows of bytes, in plain arithmetic."""
    unsigned = np.asarray(packed).view(np.uint8).astype(int)
    planes = [(unsigned >> (bits * i)) & ((1 << bits) - 1) for i in range(8 // bits)]
    codes = np.concatenate(planes, axis=-1)
    return 2 * codes - 1 if bits == 1 else codes - ((codes >> (bits - 1)) << bits)


def lowered_for(platform, function, operands, device_kind=None):
    """The text of a program for a platform, perhaps under a mesh of one such device."""

    def lower():
        traced = jax.jit(function).trace(*operands)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    if device_kind is None:
        return lower()
    device = jax.sharding.AbstractDevice(device_kind, None, platform)
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return lower()
