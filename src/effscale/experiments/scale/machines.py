"""Machines that a step is compiled for: how many chips of which kind, and what a chip can do by its maker's figures."""

import dataclasses
import math
import re

from kernels_pallas.aot_targets import TARGETS, Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What the maker says of a chip; nothing here was measured.

    Attributes:
        name: As a topology names it.
        flops: bfloat16 operations per second.
        memory: Bytes of high-bandwidth memory.
        bandwidth: Bytes per second between it and the chip.
        near: Bytes per second that a chip sends to the others that it is linked with directly, over all of its links.
        far: The same to chips of other hosts.
        clock: Cycles per second of what the compiler counts cycles of; None where it counts none.

    References:
        Google Cloud, "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e"; NVIDIA, "H100 Tensor Core GPU" and "DGX H100" (eight links of 400 Gb/s for eight GPUs).
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    near: float
    far: float
    clock: float | None = None


# The links of a TPU go from chip to chip, whatever the host.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            flops=275e12,
            memory=32e9,
            bandwidth=1228e9,
            near=300e9,
            far=300e9,
            clock=1.05e9,
        ),
        Chip(
            name="v5e",
            flops=197e12,
            memory=16e9,
            bandwidth=819e9,
            near=200e9,
            far=200e9,
            clock=1.5e9,
        ),
        Chip(
            name="v5p",
            flops=459e12,
            memory=95e9,
            bandwidth=2765e9,
            near=600e9,
            far=600e9,
            clock=1.75e9,
        ),
        Chip(
            name="v6e",
            flops=918e12,
            memory=32e9,
            bandwidth=1640e9,
            near=448e9,
            far=448e9,
            clock=1.75e9,
        ),
        Chip(name="H100", flops=989e12, memory=80e9, bandwidth=3352e9, near=450e9, far=50e9),
    )
}
HOST_GPUS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Chips of one kind.

    Attributes:
        name: As it was given.
        chip: The kind.
        count: How many.
    """

    name: str
    chip: Chip
    count: int

    @property
    def target(self) -> Target:
        """What compiles for it."""
        if self.chip.name == "H100":
            near = min(self.count, HOST_GPUS)
            topology = f"1x{self.count // near}x{near}"
            return dataclasses.replace(TARGETS["h100"], name=self.name, topology=topology)
        return Target(name=self.name, platform="tpu", topology=self.name)


def machine(name: str) -> Machine:
    """The machine of a name.

    Args:
        name: A TPU topology such as ``v5p:8x8x8``, or a number of GPUs such as ``384xH100``.

    Raises:
        ValueError: No such chip, or no such number of them.

    Example:
        >>> machine("v5p:8x8x8").count, machine("384xH100").target.topology
        (512, '1x48x8')
    """
    if match := re.fullmatch(r"(\d+)xH100", name, re.IGNORECASE):
        count = int(match[1])
        if count < 1 or (count > HOST_GPUS and count % HOST_GPUS):
            raise ValueError(
                f"topology={name!r}: must be 1 to {HOST_GPUS} GPUs, or whole hosts of {HOST_GPUS}"
            )
        return Machine(name=name, chip=CHIPS["H100"], count=count)
    match = re.fullmatch(r"(v\d\w?):(\d+(?:x\d+)+)", name)
    if match is None or match[1] not in CHIPS:
        tpus = ", ".join(name for name in CHIPS if name != "H100")
        raise ValueError(
            f"topology={name!r}: must be a TPU's kind ({tpus}) and its sides, such as v5p:8x8x8, v4:4x4x4, v5e:16x16 or v6e:16x16; or 384xH100"
        )
    count = math.prod(int(side) for side in match[2].split("x"))
    return Machine(name=name, chip=CHIPS[match[1]], count=count)
