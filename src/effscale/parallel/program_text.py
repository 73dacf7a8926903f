"""The text of a compiled program: its lines, and how often each computation runs."""

import re
from collections.abc import Iterator

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
