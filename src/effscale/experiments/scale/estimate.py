"""What a compiled step's figures mean on a machine: memory, time, days. An estimate, which rests on the compiler's cost model and the maker's figures."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from effscale.experiments.scale.config import Case
from effscale.experiments.scale.machines import HOST_GPUS, Machine, machine
from effscale.ltd import training_flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of one case. Bytes are those of a chip, seconds those of a step.

    Attributes:
        memory: All that the step takes.
        fits: Whether the chip has so much.
        operations: Of the model in a step over all chips: products, forward and backward, without what is computed again.
        compute: The compiler's cycles at the chip's clock, and fused attention, of which it tells none, at the maker's peak; where there are no cycles (GPU), all
            operations at the peak, those of recomputed layers too.
        network: What a chip sends along each axis (axes joined by "+"), at the maker's bandwidth.
        fastest: If all traffic were hidden behind computing.
        slowest: If none were. A ring along one axis reaches less than the bandwidth of all links, so that this is no upper bound.
    """

    case: Case
    memory: float
    fits: bool
    operations: float
    compute: float
    network: Mapping[str, float]
    fastest: float
    slowest: float

    @property
    def mfu(self) -> tuple[float, float]:
        """Share of the peak that the model's operations reach: of ``slowest`` and ``fastest``."""
        where = machine(self.case.topology)
        peak = where.count * where.chip.flops
        return self.operations / peak / self.slowest, self.operations / peak / self.fastest

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """Of ``slowest`` and ``fastest``."""
        tokens = self.case.batch_size * self.case.length
        return tokens / self.slowest, tokens / self.fastest


def estimate(case: Case, found: Mapping[str, Any]) -> Estimate:
    """The estimate for what a compilation found."""
    where = machine(case.topology)
    operations = float(training_flops(case.transformer(), case.length) * case.batch_size)
    compute = _compute(case, where, found, operations)
    network: dict[str, float] = {}
    for row in found["collectives"]:
        name = "+".join(row["axes"])
        network[name] = network.get(name, 0.0) + row["sent"] / _speed(case, where, row["axes"])
    sent = sum(network.values())
    return Estimate(
        case=case,
        memory=float(found["total"]),
        fits=found["total"] <= where.chip.memory,
        operations=operations,
        compute=compute,
        network=network,
        fastest=max(compute, sent),
        slowest=compute + sent,
    )


def _compute(case: Case, where: Machine, found: Mapping[str, Any], operations: float) -> float:
    chip = where.chip
    if chip.clock is None or not found["cycles"]:
        again = 4 / 3 if case.remat == "full" else 1.0
        return again * operations / (where.count * chip.flops)
    seconds = found["cycles"] / chip.clock
    if found["kernels"]:
        seconds += _attention(case) / (where.count * chip.flops)
    return seconds


def _attention(case: Case) -> float:
    """Operations of fused attention in a step: forward, twice that backward, and its scores once more; forward again where anything is recomputed, since no policy keeps what kernels leave."""
    config, length = case.transformer(), case.length
    # Operations of a row are a L + b L^2; this is the second term, which training_flops counts three times the forward pass.
    counted = training_flops(config, 2 * length) / 2 - training_flops(config, length)
    times = (1 + 2 + 0.5 + (case.remat != "none")) / 3
    return times * counted * case.batch_size


def _speed(case: Case, where: Machine, axes: Sequence[str]) -> float:
    """Bytes per second along axes. GPUs are near each other if they are all in one host: along the last axes of the mesh, if these divide a host."""
    if where.count <= HOST_GPUS:
        return where.chip.near
    sizes = dataclasses.asdict(case.mesh)
    names = [name for name, size in sizes.items() if size != 1]
    first = min((names.index(name) for name in axes), default=0)
    near = HOST_GPUS % math.prod(sizes[name] for name in names[first:]) == 0
    return where.chip.near if near else where.chip.far
