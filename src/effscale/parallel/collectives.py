"""The text of a compiled program and the collectives in it: what is sent over the network, how often, and how many bytes."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:body|calls|to_apply|\w*_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"([0-9]+)"')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_LIMIT = re.compile(r"= s32\[\]\S* constant\(([0-9]+)\)")


def lines(program: str) -> Iterator[tuple[str, str]]:
    """Yield each line with the name of the computation that contains it."""
    computation = ""
    for line in program.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header["name"]
        yield computation, line


def times(program: str) -> dict[str, int]:
    """Return how often each computation runs: the sum over its callers, times the length of the loop whose body it is."""
    callers: dict[str, list[tuple[str, int]]] = {}
    limits = _limits(program)
    for computation, line in lines(program):
        called = _CALLED.findall(line)
        for match in _BRANCHES.finditer(line):
            called += [name.strip().removeprefix("%") for name in match[1].split(",")]
        trips, condition = _TRIPS.search(line), _CONDITION.search(line)
        count = int(trips[1]) if trips else 1
        if trips is None and condition is not None:
            count = limits.get(condition[1], 1)
        for name in called:
            callers.setdefault(name, []).append((computation, count))
    known: dict[str, int] = {}

    def runs(name: str) -> int:
        if name not in known:
            above = callers.get(name)
            known[name] = sum(runs(caller) * trips for caller, trips in above) if above else 1
        return known[name]

    return {name: runs(name) for name in callers}


def _limits(program: str) -> dict[str, int]:
    """Return the lengths of scans by their condition, which only compares a count from 0 with a number. The TPU compiler reports the length nowhere else."""
    numbers: dict[str, list[int]] = {}
    compares: set[str] = set()
    for computation, line in lines(program):
        if limit := _LIMIT.search(line):
            numbers.setdefault(computation, []).append(int(limit[1]))
        if line.lstrip().startswith("ROOT ") and " compare(" in line and "direction=LT" in line:
            compares.add(computation)
    return {
        name: found[0] for name, found in numbers.items() if name in compares and len(found) == 1
    }


_KINDS = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
_LINE = re.compile(rf"= (?P<result>.*?) (?P<kind>{_KINDS})(?P<start>-start)?\((?P<rest>.*)$")
_ARRAY = re.compile(r"\b(?P<dtype>pred|[a-z]+[0-9]+[a-z0-9]*)\[(?P<dims>[0-9,]*)\]")
_BRANCH = re.compile(r"branch_([0-9]+)_fun")
_BITS = re.compile(r"[0-9]+")
_GRID = re.compile(
    r"replica_groups=\[(?P<shape>[0-9,]+)\]<=\[(?P<dims>[0-9,]+)\](?:T\((?P<order>[0-9,]+)\))?"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a compiled program, as seen by each participating device.

    Attributes:
        kind: all-reduce, all-gather, all-to-all, reduce-scatter or collective-permute.
        dtypes: The dtypes of its arrays, as XLA names them.
        size: Total bytes that are reduced, gathered or exchanged.
        group: Numbers of the devices that take part together, in the order of the mesh; those of the first group.
        branches: Its place in nested ``lax.cond`` and ``lax.switch``: the number of the branch of each, outermost first.
        times: How often it runs per call: the product of the lengths of the loops around it, as far as the compiler knows them.
    """

    kind: str
    dtypes: frozenset[str]
    size: int
    group: tuple[int, ...]
    branches: tuple[int, ...]
    times: int = 1

    @property
    def devices(self) -> int:
        """The number of devices that take part together."""
        return len(self.group)

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """Return the mesh axes along which its devices differ.

        Args:
            mesh: The sizes of the axes by name, in order: the ``shape`` of the mesh that the program was compiled for.
        """
        places = np.unravel_index(self.group, tuple(mesh.values()))
        return tuple(
            name for name, along in zip(mesh, places, strict=True) if len(set(along.tolist())) > 1
        )

    @property
    def sent(self) -> float:
        """Bytes that each device sends each time, assuming ring reductions and direct sends for everything else."""
        share = (self.devices - 1) / self.devices
        if self.kind == "all-reduce":
            return 2 * share * self.size
        return float(self.size) if self.kind == "collective-permute" else share * self.size


def collectives(program: str) -> list[Collective]:
    """Return the collectives of a compiled program that involve more than one device.

    A collective in a loop (micro-batches, a scan over layers) is listed once, with the number of ``times`` it runs. Transfers
    between TPU slices go through the host and are not listed.

    Args:
        program: ``jax.jit(f).lower(...).compile().as_text()``.

    Example:
        >>> text = "%r = f32[8]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%sum"
        >>> collectives(text)[0].sent  # half of 32 bytes there, half back
        32.0
    """
    found = []
    runs = times(program)
    for computation, line in lines(program):
        match = _LINE.search(line)
        if match is None:
            continue
        group = _group(match["rest"], program)
        arrays = [(m["dtype"], m["dims"]) for m in _ARRAY.finditer(match["result"])]
        if match["start"] and match["kind"] == "collective-permute":
            arrays = arrays[1:2]  # operand, result, two counters
        elif match["start"] and match["kind"] != "all-reduce":
            arrays = arrays[len(arrays) // 2 :]  # operands come first, then results
        kind, size = match["kind"], sum(_size(dtype, dims) for dtype, dims in arrays)
        if kind == "reduce-scatter":
            size *= len(group)
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # the TPU compiler fuses the sum with the selection of a part
        name = re.search(r'op_name="([^"]*)"', line)
        branches = tuple(int(n) for n in _BRANCH.findall(name[1])) if name else ()
        if len(group) > 1:
            dtypes = frozenset(dtype for dtype, _ in arrays)
            found.append(Collective(kind, dtypes, size, group, branches, runs.get(computation, 1)))
    return found


def _size(dtype: str, dims: str) -> int:
    bits = 8 if dtype == "pred" else int(_BITS.search(dtype)[0])  # type: ignore[index]
    return math.prod(int(d) for d in dims.split(",") if d) * bits // 8


def _group(rest: str, program: str) -> tuple[int, ...]:
    """Return the devices that take part together, as the first group lists them."""
    if match := re.search(r"replica_groups=\{\{([0-9,]*)\}", rest):
        return tuple(int(n) for n in match[1].split(","))
    if match := _GRID.search(rest):
        numbers = lambda name: [int(n) for n in match[name].split(",")]
        dims, shape = numbers("dims"), numbers("shape")
        grid = np.arange(math.prod(dims)).reshape(dims)
        if match["order"]:
            grid = grid.transpose(numbers("order"))
        return tuple(grid.reshape(shape)[0].tolist())
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=([0-9]+)", match[1])}
        along = re.findall(r"'(\w+)'", match[2])
        grid = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        places = tuple(slice(None) if name in along else 0 for name in sizes)
        return tuple(np.ravel(grid[places]).tolist())
    if match := re.search(r"source_target_pairs=\{(\{[^}]*\}(?:,\{[^}]*\})*)\}", rest):
        pairs = [(int(a), int(b)) for a, b in re.findall(r"\{([0-9]+),([0-9]+)\}", match[1])]
        return next((pair for pair in pairs if pair[0] != pair[1]), pairs[0][:1])
    count = re.search(r"num_partitions=([0-9]+)", program)
    return tuple(range(int(count[1]) if count else 1))
