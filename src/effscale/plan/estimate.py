"""Estimate memory, time and days on a machine from a compiled step.

The estimate relies on the compiler's cost model and the manufacturer's specifications.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from effscale.ltd import training_flops
from effscale.parallel.machines import Machine, machine
from effscale.parallel.program_cost import traffic
from effscale.plan.cases import Case


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """The estimate of one case. Bytes are per chip, seconds are per step.

    Attributes:
        memory: Total memory of the step.
        fits: Whether the chip has enough memory.
        operations: Operations of the model in a step over all chips: matrix products, forward and backward, without
        recomputation.
        compute: The compiler's cycles at the chip's clock rate, plus fused attention, for which it reports no cycles,
        at the peak rate of the specification. Without cycles (GPU), all operations at the peak rate, including
        recomputed layers.
        sent: Bytes along each axis (axes joined by "+").
        exchanged: Bytes of these that are sent in all-to-alls.
        network: Seconds for what a chip sends along each axis, at the bandwidth of the specification.
        fastest: Seconds if all traffic overlapped with computation.
        slowest: Seconds if no traffic overlapped. A ring along one axis reaches less than the bandwidth of all links,
        so this is not an upper bound.
    """

    case: Case
    memory: float
    fits: bool
    operations: float
    compute: float
    sent: Mapping[str, float]
    exchanged: float
    network: Mapping[str, float]
    fastest: float
    slowest: float

    @property
    def mfu(self) -> tuple[float, float]:
        """Fraction of the peak rate that the model's operations reach, for ``slowest`` and ``fastest``."""
        where = machine(self.case.topology)
        peak = where.count * where.chip.flops
        return self.operations / peak / self.slowest, self.operations / peak / self.fastest

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """Tokens per second for ``slowest`` and ``fastest``: tokens read, or in decoding, tokens generated."""
        tokens = self.case.batch_size * (1 if self.case.decode else self.case.length)
        return tokens / self.slowest, tokens / self.fastest

    def sent_along(self, axis: str) -> float:
        """Return the bytes of collectives along an axis, by itself or together with others."""
        return math.fsum(size for names, size in self.sent.items() if axis in names.split("+"))


def estimate(
    case: Case,
    found: Mapping[str, Any],
    *,
    data_bandwidth: float | None = None,
    branch: int | None = None,
) -> Estimate:
    """Estimate a case from the results of its compilation.

    Args:
        case: The compiled case.
        found: The results of the worker.
        data_bandwidth: Bytes per second that a chip sends along ``data``; None uses the same as along the other axes.
        branch: The branch of the program that runs; None counts the traffic of all branches.
    """
    where = machine(case.topology)
    rows = [
        row for row in found["collectives"] if branch is None or row.get("branch") in (None, branch)
    ]
    sent, network = traffic(rows, dataclasses.asdict(case.mesh), where, data_bandwidth)
    exchanged = math.fsum(
        row["sent"] for row in rows if row["kind"] == "all-to-all" and "expert" in row["axes"]
    )
    sending = sum(network.values())
    if case.decode is None:
        operations = _operations(case)
        compute = _compute(case, where, found, operations)
        fastest, slowest = max(compute, sending), compute + sending
    else:
        # Decoding a token needs few operations; the bytes read dominate: each once, or as the compiler expects.
        operations, compute = 0.0, found["arguments"] / where.chip.bandwidth
        again = max(compute, (found["accessed"] or 0) / where.chip.bandwidth)
        if where.chip.clock is not None:
            again = max(again, found["cycles"] / where.chip.clock)
        fastest, slowest = max(compute, sending), again + sending
    return Estimate(
        case=case,
        memory=float(found["total"]),
        fits=found["total"] <= where.chip.memory,
        operations=operations,
        compute=compute,
        sent=sent,
        exchanged=exchanged,
        network=network,
        fastest=fastest,
        slowest=slowest,
    )


def _operations(case: Case) -> float:
    return float(training_flops(case.transformer(), case.length, case.kept) * case.batch_size)


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
    """Return the operations of fused attention in a step: forward, twice that for backward, and the scores again. If anything is recomputed,
    forward counts again, since no policy stores the outputs of kernels.
    """
    config, length, kept = case.transformer(), case.length, case.kept

    def counted(length: int) -> int:
        # The operations of a row are a L + b L^2; this is the second term, which training_flops counts as three times
        # the forward pass.
        return training_flops(config, 2 * length) // 2 - training_flops(config, length)

    squares = counted(length)
    if kept is not None:
        # All layers except two process only kept tokens.
        share = 2 / config.num_layers
        squares = share * squares + (1 - share) * counted(kept)
    times = (1 + 2 + 0.5 + (case.remat != "none")) / 3
    return times * squares * case.batch_size
