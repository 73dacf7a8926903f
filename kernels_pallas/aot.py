"""Compile programs for TPUs and GPUs on a machine without either, and print the resources they need.

    python -m kernels_pallas.aot --targets v5e v6e h100 --programs benchmarks.kernels.cross_entropy

Any module can contribute: ``--programs`` names modules with a function ``programs()`` that returns a list of
``Program``. Each target is compiled for in a separate process, because libtpu writes to stderr. The exit
status is 1 if a program did not compile. ``aot-requirements.txt`` lists the compilers.
"""

import argparse
import dataclasses
import importlib
import json
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from kernels_pallas.aot_targets import TARGETS

_COLLECTIVE = re.compile(
    r" (?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
_KERNEL = re.compile(r'custom_call_target="(?:tpu_custom_call|mosaic_gpu[^"]*|__cudnn\$fmha[^"]*)"')

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A program to compile for a target."""

    name: str
    lower: Callable[[Sequence[Any]], Any]
    """Maps the target's devices to a ``jax.stages.Lowered``; it may use any number of them."""
    flops: float | None = None
    """Floating-point operations over all devices, if known; XLA counts the body of a loop only once."""
    targets: tuple[str, ...] = ("v5e", "v6e", "h100")
    without: str | None = None
    """A regular expression that must not match the compiled program; a match counts as a failure."""
    report: Callable[[str], str] | None = None
    """Maps the compiled program to a note for the table; a ``ValueError`` counts as a failure."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The result of one program on one target; sizes are bytes on each device."""

    target: str
    program: str
    seconds: float = 0.0
    arguments: int = 0
    outputs: int = 0
    temporaries: int = 0
    total: int = 0
    kernels: int = 0
    collectives: int = 0
    flops: float | None = None
    accessed: float | None = None
    """Bytes read and written, as the compiler counts them and kernels declare them. The body of a loop counts once."""
    optimal: float | None = None
    """Seconds estimated by the compiler's cost model; the body of a loop counts once."""
    cycles: int | None = None
    """Cycles that the TPU compiler expects for its own operations outside of loops; kernels are not included."""
    note: str = ""
    error: str = ""


def compile_program(program: Program, target: str, devices: Sequence[Any]) -> Row:
    """Compile one program; an error is recorded in the row."""
    start = time.perf_counter()
    try:
        compiled = program.lower(devices).compile()
    except Exception as error:  # any compiler error is a result to report
        return Row(target=target, program=program.name, error=f"{type(error).__name__}: {error}")
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if program.without and (found := re.search(program.without, text)):
        error = f"the compiled program contains {found[0]}"
        return Row(target=target, program=program.name, error=error)
    try:
        note = "" if program.report is None else program.report(text)
    except ValueError as error:
        return Row(target=target, program=program.name, error=str(error))
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }
    costs = compiled.cost_analysis() or {}  # none for GPUs
    cycles = [int(number) for number in _CYCLES.findall(text[text.rfind("\nENTRY") :])]
    return Row(
        target=target,
        program=program.name,
        seconds=seconds,
        **sizes,
        total=sum(sizes.values()) - memory.alias_size_in_bytes,
        kernels=len(_KERNEL.findall(text)),
        collectives=len(_COLLECTIVE.findall(text)),
        flops=program.flops,
        accessed=costs.get("bytes accessed"),
        # The cost model adds a second for each operation that it does not know; remove these.
        optimal=costs["optimal_seconds"] % 1 if "optimal_seconds" in costs else None,
        cycles=sum(cycles) if cycles else None,
        note=note,
    )


def programs_of(modules: Sequence[str], target: str) -> list[Program]:
    """Return the programs that the named modules provide for a target."""
    found = [program for name in modules for program in importlib.import_module(name).programs()]
    return [program for program in found if target in program.targets]


def table(rows: Sequence[Row]) -> str:
    """Format the rows as a Markdown table."""
    header = (
        "target program compile_s arguments outputs temporaries total kernels collectives TFLOP "
        "accessed optimal_us kcycles note"
    )
    lines = ["| " + " | ".join(header.split()) + " |", "|---|---|" + "---:|" * 11 + "---|"]
    for row in rows:
        if row.error:
            lines.append(f"| {row.target} | {row.program} | failed |" + " |" * 11)
            continue
        sizes = row.arguments, row.outputs, row.temporaries, row.total
        cells = [row.target, row.program, f"{row.seconds:.1f}"]
        cells += [f"{size / 2**20:,.1f} MiB" for size in sizes]
        cells += [str(row.kernels), str(row.collectives)]
        cells += ["" if row.flops is None else f"{row.flops / 1e12:.3f}"]
        cells += ["" if row.accessed is None else f"{row.accessed / 2**20:,.1f} MiB"]
        cells += ["" if row.optimal is None else f"{1e6 * row.optimal:,.1f}"]
        cells += ["" if row.cycles is None else f"{row.cycles / 1e3:,.1f}"]
        cells += [row.note]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _compile_all(target: str, modules: Sequence[str], only: str) -> None:
    """In the child process: write one line of JSON per program to stdout."""
    devices = TARGETS[target].devices()
    for program in programs_of(modules, target):
        if only in program.name:
            print(
                json.dumps(dataclasses.asdict(compile_program(program, target, devices))),
                flush=True,
            )


def _run_child(target: str, arguments: argparse.Namespace) -> list[Row]:
    command = [
        sys.executable,
        "-m",
        "kernels_pallas.aot",
        "--child",
        target,
        "--only",
        arguments.only,
    ]
    command += ["--programs", *arguments.programs]
    done = subprocess.run(
        command, env=TARGETS[target].environment(), capture_output=True, text=True, check=False
    )
    rows = [Row(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-15:])
        message = f"the compiling process ended with status {done.returncode}:\n{tail}"
        rows.append(Row(target=target, program="(all)", error=message))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, compile, and print; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels_pallas.aot", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument(
        "--programs",
        nargs="+",
        required=True,
        help="modules with a function programs()",
    )
    parser.add_argument(
        "--only", default="", help="compile only programs whose name contains this text"
    )
    parser.add_argument("--json", type=pathlib.Path, help="also write the rows to this file")
    parser.add_argument("--child", choices=TARGETS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        _compile_all(arguments.child, arguments.programs, arguments.only)
        return 0
    rows: list[Row] = []
    for target in arguments.targets:
        print(f"compiling for {target} ...", file=sys.stderr, flush=True)
        rows += _run_child(target, arguments)
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
    failed = [row for row in rows if row.error]
    for row in failed:
        print(f"\n{row.target} {row.program}\n{row.error}", file=sys.stderr)
    if not rows:
        print(f"no program has a name that contains {arguments.only!r}", file=sys.stderr)
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
