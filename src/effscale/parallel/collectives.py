"""The collectives of a compiled program: what crosses the network, how often, and how many bytes."""

import dataclasses
import math
import re
from collections.abc import Iterator

_KINDS = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
_LINE = re.compile(rf"= (?P<result>.*?) (?P<kind>{_KINDS})(?P<start>-start)?\((?P<rest>.*)$")
_ARRAY = re.compile(r"\b(?P<dtype>pred|[a-z]+[0-9]+[a-z0-9]*)\[(?P<dims>[0-9,]*)\]")
_BRANCH = re.compile(r"branch_([0-9]+)_fun")
_BITS = re.compile(r"[0-9]+")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:body|calls|to_apply|\w*_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"([0-9]+)"')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_LIMIT = re.compile(r"= s32\[\]\S* constant\(([0-9]+)\)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a compiled program, as each device takes part in it.

    Attributes:
        kind: all-reduce, all-gather, all-to-all, reduce-scatter or collective-permute.
        dtypes: Of its arrays, as XLA names them.
        size: Bytes of the whole: of what is reduced, gathered, or exchanged.
        devices: Devices that take part together.
        branches: Where it stands in nested ``lax.cond`` and ``lax.switch``: the number of the branch of each, outermost first.
        times: How often it runs in a call: the product of the lengths of the loops around it, as far as the compiler knows them.
    """

    kind: str
    dtypes: frozenset[str]
    size: int
    devices: int
    branches: tuple[int, ...]
    times: int = 1

    @property
    def sent(self) -> float:
        """Bytes that each device sends each time, where reductions go around a ring and the rest directly to its goal."""
        share = (self.devices - 1) / self.devices
        if self.kind == "all-reduce":
            return 2 * share * self.size
        return float(self.size) if self.kind == "collective-permute" else share * self.size


def collectives(program: str) -> list[Collective]:
    """The collectives of a compiled program that involve more than one device.

    One in a loop (micro-batches, a scan over layers) is told once, with the number of ``times`` that it runs. Between TPU slices
    XLA sends by the host, which is not told.

    Args:
        program: ``jax.jit(f).lower(...).compile().as_text()``.

    Example:
        >>> text = "%r = f32[8]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%sum"
        >>> collectives(text)[0].sent  # half of 32 bytes there, half back
        32.0
    """
    found = []
    times = _times(program)
    for computation, line in _lines(program):
        match = _LINE.search(line)
        if match is None:
            continue
        devices = _devices(match["rest"], program)
        arrays = [(m["dtype"], m["dims"]) for m in _ARRAY.finditer(match["result"])]
        if match["start"] and match["kind"] == "collective-permute":
            arrays = arrays[1:2]  # operand, result, two counters
        elif match["start"] and match["kind"] != "all-reduce":
            arrays = arrays[len(arrays) // 2 :]  # operands come first, then results
        size = sum(_size(dtype, dims) for dtype, dims in arrays)
        if match["kind"] == "reduce-scatter":
            size *= devices
        name = re.search(r'op_name="([^"]*)"', line)
        branches = tuple(int(n) for n in _BRANCH.findall(name[1])) if name else ()
        if devices > 1:
            dtypes = frozenset(dtype for dtype, _ in arrays)
            runs = times.get(computation, 1)
            found.append(Collective(match["kind"], dtypes, size, devices, branches, runs))
    return found


def _lines(program: str) -> Iterator[tuple[str, str]]:
    """Each line with the name of the computation that it stands in."""
    computation = ""
    for line in program.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header["name"]
        yield computation, line


def _times(program: str) -> dict[str, int]:
    """How often each computation runs: the sum over its callers, times the length of the loop that it is the body of."""
    callers: dict[str, list[tuple[str, int]]] = {}
    limits = _limits(program)
    for computation, line in _lines(program):
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
    """Lengths of scans by their condition, which compares a count from 0 with one number and nothing else. A TPU's compiler tells the length in no other place."""
    numbers: dict[str, list[int]] = {}
    compares: set[str] = set()
    for computation, line in _lines(program):
        if limit := _LIMIT.search(line):
            numbers.setdefault(computation, []).append(int(limit[1]))
        if line.lstrip().startswith("ROOT ") and " compare(" in line and "direction=LT" in line:
            compares.add(computation)
    return {
        name: found[0] for name, found in numbers.items() if name in compares and len(found) == 1
    }


def _size(dtype: str, dims: str) -> int:
    bits = 8 if dtype == "pred" else int(_BITS.search(dtype)[0])  # type: ignore[index]
    return math.prod(int(d) for d in dims.split(",") if d) * bits // 8


def _devices(rest: str, program: str) -> int:
    if match := re.search(r"replica_groups=\{\{([0-9,]*)\}", rest):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[[0-9]+,([0-9]+)\]", rest):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=([0-9]+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    if "source_target_pairs=" in rest:
        return 2
    count = re.search(r"num_partitions=([0-9]+)", program)
    return int(count[1]) if count else 1
