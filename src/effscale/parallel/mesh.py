"""Configuration of the device mesh."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "expert", "tensor")
"""Mesh axes, slowest first: neighbors along ``tensor`` are the closest devices."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The number of devices along each mesh axis.

    One size may be -1, which means all remaining devices. The product of the sizes must be the number of devices.

    >>> MeshConfig(fsdp=2, tensor=2).sizes(8)
    (2, 2, 1, 2)
    """

    data: int = -1
    """Replicas of the parameters, each with its own rows of the batch."""
    fsdp: int = 1
    """Devices that share the batch and each store one shard of the parameters and the optimizer state."""
    expert: int = 1
    """Devices that share the batch and hold different experts."""
    tensor: int = 1
    """Devices that split the heads, the feed-forward width and the vocabulary of one replica."""

    def __post_init__(self):
        """Check each size; the number of devices is known only at ``build``."""
        for axis in AXES:
            size = getattr(self, axis)
            if isinstance(size, bool) or not isinstance(size, int) or not (size >= 1 or size == -1):
                raise ValueError(
                    f"MeshConfig.{axis} must be a positive integer, or -1 for all remaining devices, got {size!r}"
                )
        free = [axis for axis in AXES if getattr(self, axis) == -1]
        if len(free) > 1:
            raise ValueError(
                f"MeshConfig has -1 for {' and '.join(free)}: at most one axis may be -1, got {self}"
            )

    def sizes(self, num_devices: int) -> tuple[int, int, int, int]:
        """Return the sizes in the order of ``AXES`` for a number of devices.

        Raises:
            ValueError: The devices cannot be divided in this way.
        """
        given = tuple(getattr(self, axis) for axis in AXES)
        fixed = math.prod(size for size in given if size != -1)
        if -1 in given:
            if num_devices % fixed:
                raise ValueError(
                    f"{self} needs a multiple of {fixed} devices, but there are {num_devices}. Use sizes whose "
                    f"product is one of {_divisors(num_devices)}"
                )
            data, fsdp, expert, tensor = (
                num_devices // fixed if size == -1 else size for size in given
            )
            return data, fsdp, expert, tensor
        if fixed != num_devices:
            raise ValueError(
                f"{self} describes {fixed} devices, but there are {num_devices}. Set data=-1 to use them all, or "
                f"build the mesh from {fixed} of them with build(devices=...)"
            )
        return given

    def build(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """Build the mesh; activate it with ``jax.set_mesh``.

        If the devices are on several TPU slices or GPU hosts, the first axes span these, and ``tensor`` stays within one as far as
        it fits.

        Args:
            devices: The devices to use; by default, all devices of all processes.

        Returns:
            A mesh with the axes ``AXES``, all of type Auto.

        Raises:
            ValueError: The devices cannot be divided in this way.
        """
        shape = self.sizes(jax.device_count() if devices is None else len(devices))
        types = (AxisType.Auto,) * len(AXES)
        found = jax.devices() if devices is None else devices
        if len({getattr(device, "slice_index", 0) for device in found}) > 1:
            return Mesh(over_slices(shape, found), AXES, axis_types=types)
        try:
            return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
        except NotImplementedError:
            # A mesh axis may be smaller than a physical TPU axis or combine parts of several, such as 128 of 8 x 8 x 8 chips.
            placed = mesh_utils.create_device_mesh(shape, found, allow_split_physical_axes=True)
            return Mesh(placed, AXES, axis_types=types)


def over_slices(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Arrange devices of several TPU slices or GPU hosts, which are connected by a slower network, in the order of a mesh.

    ``jax.make_mesh`` does not accept such devices.

    Args:
        shape: Sizes of the axes.
        devices: All devices.
    """
    across = _over_slices(shape, len({device.slice_index for device in devices}))
    within = tuple(size // part for size, part in zip(shape, across, strict=True))
    return mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
    )


def _over_slices(shape: tuple[int, ...], slices: int) -> tuple[int, ...]:
    """Return the number of slices along each axis; the first axes take as many as they can, so ``tensor`` stays within one.

    >>> _over_slices((2, 16, 1, 8), 4)
    (2, 2, 1, 1)
    """
    split, left = [], slices
    for size in shape:
        split.append(math.gcd(size, left))
        left //= split[-1]
    if left > 1:
        raise ValueError(
            f"the mesh {dict(zip(AXES, shape, strict=True))} cannot be divided over {slices} slices or hosts. Make data, or another axis, "
            f"a multiple of {slices}"
        )
    return tuple(split)


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
