"""Shared by the benchmarks: workers in separate processes that take turns, and medians of their results.

A benchmark is one file. It starts itself again as each of its workers, A B A B ..., so that drifts of the machine's
speed affect all of them equally. A worker measures one thing and prints one line of JSON.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Worker = Callable[[], Mapping[str, float]]


def seconds(function: Callable[[], Any], *, repeats: int, warmup: int = 2) -> float:
    """Return the median time of a call; the function must wait for its result."""
    for _ in range(warmup):
        function()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main(
    workers: Mapping[str, Worker],
    *,
    rounds: int,
    report: Callable[[dict[str, dict[str, float]]], str],
) -> None:
    """Run all workers in turn and print a table; with ``--worker``, run only that worker.

    Args:
        workers: Workers by name. A name that ends in ``@newest`` runs under the interpreter given by ``--newest``.
        rounds: How often each worker runs.
        report: Returns the lines below the table, given the median of each figure by worker.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--worker", help="run only this worker and print its figures as JSON")
    parser.add_argument("--rounds", type=int, default=rounds, help="how often each worker runs")
    parser.add_argument(
        "--newest", help="another Python, with a newer jax, for the workers named ...@newest"
    )
    args = parser.parse_args()
    if args.worker:
        print(json.dumps({**workers[args.worker](), **_versions()}))
        return
    figures: dict[str, list[dict[str, Any]]] = {}
    for round_ in range(args.rounds):
        for name in workers:
            if name.endswith("@newest") and not args.newest:
                continue
            print(f"round {round_ + 1}: {name}", file=sys.stderr, flush=True)
            python = args.newest if name.endswith("@newest") else sys.executable
            figures.setdefault(name, []).append(_run(python, name))
    medians = {
        name: {
            key: statistics.median(run[key] for run in runs)
            for key, value in runs[0].items()
            if isinstance(value, (int, float))
        }
        for name, runs in figures.items()
    }
    print(f"machine: {_machine()}; {args.rounds} rounds, medians")
    for name, runs in figures.items():
        spread = ", ".join(
            f"{key} {medians[name][key]:,.4g} ({min(r[key] for r in runs):,.4g} to {max(r[key] for r in runs):,.4g})"
            for key in medians[name]
        )
        words = ", ".join(f"{k} {v}" for k, v in runs[0].items() if isinstance(v, str))
        print(f"  {name}: {spread} [{words}]")
    print(report(medians))


def _run(python: str, name: str) -> dict[str, Any]:
    command = [python, sys.argv[0], "--worker", name]
    environment = {
        **os.environ,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"worker {name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("jax", "flax", "torch", "transformers"):
        if name in sys.modules:
            versions[name] = sys.modules[name].__version__
    return versions


def _machine() -> str:
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(
                line.split(":")[1].strip() for line in file if line.startswith("model name")
            )
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as lines with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
