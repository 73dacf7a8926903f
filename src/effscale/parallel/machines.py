"""Machines that a step can be compiled for: number and kind of chips, with the manufacturer's specifications."""

import dataclasses
import math
import re

from kernels_pallas.aot_targets import TARGETS, Target

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Specifications of a chip; nothing here was measured.

    Attributes:
        name: The name in a topology.
        flops: bfloat16 operations per second, from the manufacturer.
        memory: Bytes of high-bandwidth memory that a program can use, from the compiler.
        bandwidth: Bytes per second between chip and memory, from the manufacturer.
        near: Bytes per second that a chip sends over all of its links to neighboring chips, from the manufacturer.
        far: The same to chips of other hosts.
        sides: Number of dimensions of a topology; None for GPUs.
        clock: Clock rate in Hz to convert the compiler's cycles to seconds; None if it is unknown, or if the compiler
        reports no cycles.

    References:
        Google Cloud, "TPU v5e", "TPU v5p" and "TPU v6e", documentation.
        NVIDIA, "H100 Tensor Core GPU" and "DGX H100" (eight links of 400 Gb/s for eight GPUs), data sheets.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    near: float
    far: float
    sides: int | None = None
    clock: float | None = None


# The links of a TPU connect chips directly, across hosts.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5e",
            flops=197e12,
            memory=15.75 * GIB,
            bandwidth=819e9,
            near=200e9,
            far=200e9,
            sides=2,
            clock=1.5e9,
        ),
        Chip(
            name="v5p",
            flops=459e12,
            memory=95.74 * GIB,
            bandwidth=2765e9,
            near=600e9,
            far=600e9,
            sides=3,
            clock=1.75e9,
        ),
        Chip(
            name="v6e",
            flops=918e12,
            memory=31.25 * GIB,
            bandwidth=1640e9,
            near=448e9,
            far=448e9,
            sides=2,
        ),
        Chip(
            name="H100",
            flops=989e12,
            memory=84_978_434_048.0,
            bandwidth=3352e9,
            near=450e9,
            far=50e9,
        ),
    )
}
HOST_GPUS = 8

ANSWER = (
    *("v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16"),
    *("v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4", "v5p:4x4x4", "v5p:4x4x8", "v5p:8x8x8", "v5p:8x8x16", "v5p:16x16x24"),
    *("v6e:2x2", "v6e:2x4", "v6e:4x4", "v6e:4x8", "v6e:8x8", "v6e:8x16", "v6e:16x16"),
)  # fmt: skip
"""Topologies that libtpu knows; others of whole hosts, 2 by 2 chips, work as well."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Chips of one kind.

    Attributes:
        name: The name of the machine.
        chip: The kind of chip.
        count: Number of chips.
    """

    name: str
    chip: Chip
    count: int

    @property
    def target(self) -> Target:
        """The compilation target."""
        if self.chip.name == "H100":
            near = min(self.count, HOST_GPUS)
            topology = f"1x{self.count // near}x{near}"
            return dataclasses.replace(TARGETS["h100"], name=self.name, topology=topology)
        return Target(name=self.name, platform="tpu", topology=self.name)


def _answers(sides: list[int]) -> bool:
    """Return whether libtpu knows the topology: whole hosts, which are 2 by 2 chips."""
    return min(sides) >= 1 and sides[0] % 2 == 0 and sides[1] % 2 == 0


def machine(name: str) -> Machine:
    """Return the machine with a name.

    Args:
        name: A TPU topology such as ``v5p:8x8x8``, or a number of GPUs such as ``384xH100``.

    Raises:
        ValueError: The chip is unknown, or the number of chips is not supported.

    Example:
        >>> machine("v5p:8x8x8").count, machine("384xH100").target.topology
        (512, '1x48x8')
    """
    if match := re.fullmatch(r"(\d+)xH100", name, re.IGNORECASE):
        count = int(match[1])
        if count < 1 or (count > HOST_GPUS and count % HOST_GPUS):
            raise ValueError(
                f"topology must be 1 to {HOST_GPUS} GPUs, or whole hosts of {HOST_GPUS}, got {name!r}"
            )
        return Machine(name=name, chip=CHIPS["H100"], count=count)
    kind, _, shape = name.partition(":")
    sides = [int(side) for side in shape.split("x") if side.isdecimal()]
    chip = CHIPS.get(kind)
    written = chip is not None and shape == "x".join(map(str, sides))
    if chip is None or not written or len(sides) != chip.sides or not _answers(sides):
        raise ValueError(
            f"topology must be one of {', '.join(ANSWER)}, or 1xH100 to 8xH100, 16xH100, ... 384xH100, in whole hosts of {HOST_GPUS}, got {name!r}. "
            "The first two sides of a TPU topology must be even"
        )
    return Machine(name=name, chip=chip, count=math.prod(sides))
