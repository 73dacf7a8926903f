"""What a compiled program needs on a machine: memory, operations, traffic, and the time that these suggest."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from effscale.parallel.collectives import collectives, lines, times
from effscale.parallel.machines import HOST_GPUS, Machine

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_KERNEL = re.compile(r'custom_call_target="tpu_custom_call"')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramCost:
    """Memory and time of a step on a machine. Bytes are per chip, seconds are per step.

    The memory and the traffic are the compiler's figures. The times are estimates from specifications, which no machine confirmed.

    Attributes:
        memory: Total memory of the step.
        available: Memory of a chip.
        operations: Operations of matrix products in a step over all chips, with what is recomputed.
        compute: Seconds for the compiler's cycles, or for the operations at the peak rate of all chips if that is more or the compiler
            reports no cycles (on GPUs).
        sent: Bytes along each axis of the mesh (axes joined by "+").
        network: Seconds for what a chip sends along each axis, at the bandwidth of the specification.
    """

    memory: float
    available: float
    operations: float
    compute: float
    sent: Mapping[str, float]
    network: Mapping[str, float]

    @property
    def fits(self) -> bool:
        """Whether a chip has enough memory."""
        return self.memory <= self.available

    @property
    def fastest(self) -> float:
        """Seconds if all traffic overlapped with computation."""
        return max(self.compute, math.fsum(self.network.values()))

    @property
    def slowest(self) -> float:
        """Seconds if no traffic overlapped with computation."""
        return self.compute + math.fsum(self.network.values())


def program_cost(
    compiled: jax.stages.Compiled, operations: float, sizes: Mapping[str, int], where: Machine
) -> ProgramCost:
    """Return what a compiled program needs on a machine.

    Args:
        compiled: The program, compiled for the machine or for devices that stand in for it.
        operations: Operations of its matrix products; see ``matmul_operations``.
        sizes: Sizes of the mesh by axis.
        where: The machine.
    """
    text, chip = compiled.as_text() or "", where.chip
    sent, network = traffic(collective_sums(text, sizes), sizes, where)
    cycles = work(text)["cycles"] / (chip.clock or math.inf)
    return ProgramCost(
        memory=float(total_memory(compiled)),
        available=chip.memory,
        operations=operations,
        compute=max(cycles, operations / (where.count * chip.flops)),
        sent=sent,
        network=network,
    )


def total_memory(compiled: jax.stages.Compiled) -> int:
    """Return the bytes of memory that a program needs per device, by the compiler's account."""
    memory = compiled.memory_analysis()
    assert memory is not None  # all compilers used here report it
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + outputs + memory.temp_size_in_bytes


def collective_sums(text: str, mesh: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return the bytes that a chip sends in a step, by kind of collective, mesh axes and branch (the number of the innermost ``lax.cond`` or
    ``lax.switch`` branch around it, or None).
    """
    found: dict[tuple[str, tuple[str, ...], int], list[float]] = {}
    for collective in collectives(text):
        axes, branches = collective.axes(mesh), collective.branches
        if not axes:  # a group of one device
            continue
        row = found.setdefault((collective.kind, axes, branches[-1] if branches else -1), [0, 0.0])
        row[0] += collective.times
        row[1] += collective.times * collective.sent
    return [
        {
            "kind": kind,
            "axes": list(axes),
            "branch": None if branch < 0 else branch,
            "times": count,
            "sent": sent,
        }
        for (kind, axes, branch), (count, sent) in sorted(found.items())
    ]


def work(text: str) -> dict[str, int]:
    """Return the cycles that the compiler expects for its operations, and the number of kernels, which have no expected cycles. Operations in
    loops count as often as they run.
    """
    runs = times(text)
    total = {"cycles": 0, "kernels": 0}
    for computation, line in lines(text):
        count = runs.get(computation, 1)
        if match := _CYCLES.search(line):
            total["cycles"] += count * int(match[1])
        if _KERNEL.search(line):
            total["kernels"] += count
    return total


def traffic(
    rows: Iterable[Mapping[str, Any]],
    sizes: Mapping[str, int],
    where: Machine,
    data_bandwidth: float | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the bytes that a chip sends along each axis (axes joined by "+"), and the seconds that this takes.

    Args:
        rows: What `collective_sums` returns.
        sizes: Sizes of the mesh by axis.
        where: The machine.
        data_bandwidth: Bytes per second along ``data``; None uses the same as along the other axes.
    """
    sent: dict[str, float] = {}
    network: dict[str, float] = {}
    for row in rows:
        name = "+".join(row["axes"])
        speed = link_speed(sizes, where, row["axes"])
        if data_bandwidth is not None and "data" in row["axes"]:
            speed = min(speed, data_bandwidth)
        sent[name] = sent.get(name, 0.0) + row["sent"]
        network[name] = network.get(name, 0.0) + row["sent"] / speed
    return sent, network


def link_speed(sizes: Mapping[str, int], where: Machine, axes: Sequence[str]) -> float:
    """Return the bytes per second along axes. GPUs use the fast links if they are all in one host: along the last axes of the mesh, if these
    divide a host.
    """
    if where.count <= HOST_GPUS:
        return where.chip.near
    names = [name for name, size in sizes.items() if size != 1]
    first = min((names.index(name) for name in axes), default=0)
    near = HOST_GPUS % math.prod(sizes[name] for name in names[first:]) == 0
    return where.chip.near if near else where.chip.far


def matmul_operations(jaxpr: Any) -> float:
    """Return the operations of the matrix products of a traced program, over all devices.

    A scan counts as often as it runs, of a conditional the most expensive branch, and of a ``while`` loop one iteration.

    Args:
        jaxpr: A jaxpr, such as ``jax.make_jaxpr(function)(*arguments)``.

    Example:
        >>> import jax.numpy as jnp
        >>> matmul_operations(jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 4))))  # 2 * 2 * 3 * 4
        48.0
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = math.prod(shape[axis] for axis in contracted)
            total += 2.0 * inner * math.prod(equation.outvars[0].aval.shape)
            continue
        parts = [matmul_operations(inner) for inner in _inner(params.values())]
        if name == "cond":
            total += max(parts)
        elif name == "pallas_call":
            total += sum(parts) * math.prod(params["grid_mapping"].grid)
        elif name == "shard_map":
            sizes = params["mesh"].shape
            total += sum(parts) * math.prod(sizes[axis] for axis in params["manual_axes"])
        else:
            total += sum(parts) * (params["length"] if name == "scan" else 1)
    return total


def _inner(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns"):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _inner(value)
