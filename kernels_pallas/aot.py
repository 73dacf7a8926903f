"""Compile programs for TPUs and GPUs on a machine that has neither, and print what they take.

    python -m kernels_pallas.aot --targets v5e v6e h100 --programs kernels_pallas.cross_entropy.aot

Any module can contribute: ``--programs`` names modules with a function ``programs()`` that returns
``Program``s. Each target is compiled for in a process of its own, since libtpu talks on stderr. The exit
status is 1 if a program did not compile. ``aot-requirements.txt`` has the compilers.
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

OWN_PROGRAMS = (
    "kernels_pallas.attention.aot",
    "kernels_pallas.cross_entropy.aot",
    "kernels_pallas.expert_matmul.aot",
    "kernels_pallas.packed_matmul.aot",
    "kernels_pallas.quantized_matmul.aot",
    "kernels_pallas.sign_compress.aot",
    "kernels_pallas.top_k_gating.aot",
)

_COLLECTIVE = re.compile(
    r" (?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
_KERNEL = re.compile(r'custom_call_target="(?:tpu_custom_call|mosaic_gpu[^"]*|__cudnn\$fmha[^"]*)"')

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """Something to compile for a target."""

    name: str
    lower: Callable[[Sequence[Any]], Any]
    """From the target's devices to a ``jax.stages.Lowered``, for as many of them as it likes."""
    flops: float | None = None
    """Floating-point operations over all devices, if known; XLA counts a loop's body once."""
    targets: tuple[str, ...] = ("v5e", "v6e", "h100")
    without: str | None = None
    """A regular expression that finds nothing in the compiled program, or it counts as failed."""
    report: Callable[[str], str] | None = None
    """From the compiled program to what is to be said of it; a ``ValueError`` counts as failed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What came of one program on one target; sizes are bytes on each device."""

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
    """Bytes read and written, as the compiler counts them; those of a kernel as it is declared. A loop's body counts once."""
    optimal: float | None = None
    """Seconds, of the compiler's cost model, likewise."""
    cycles: int | None = None
    """What the TPU compiler expects of each of its own operations outside of loops; kernels are not in it."""
    note: str = ""
    error: str = ""


def compile_program(program: Program, target: str, devices: Sequence[Any]) -> Row:
    """Compile one program; an error becomes part of the row."""
    start = time.perf_counter()
    try:
        compiled = program.lower(devices).compile()
    except Exception as error:  # whatever a compiler raises is the result to report
        return Row(target=target, program=program.name, error=f"{type(error).__name__}: {error}")
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if program.without and (found := re.search(program.without, text)):
        error = f"the compiled program holds {found[0]}"
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
        # A second is taken off for each operation that the model does not know.
        optimal=costs["optimal_seconds"] % 1 if "optimal_seconds" in costs else None,
        cycles=sum(cycles) if cycles else None,
        note=note,
    )


def programs_of(modules: Sequence[str], target: str) -> list[Program]:
    """The programs that the named modules have for a target."""
    found = [program for name in modules for program in importlib.import_module(name).programs()]
    return [program for program in found if target in program.targets]


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
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
    """In the child: one JSON line a program on stdout."""
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
    """Parse the command line, compile, print; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels_pallas.aot", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument(
        "--programs", nargs="+", default=list(OWN_PROGRAMS), help="modules with programs()"
    )
    parser.add_argument("--only", default="", help="only programs whose name holds this")
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
        print(f"no program's name holds {arguments.only!r}", file=sys.stderr)
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
