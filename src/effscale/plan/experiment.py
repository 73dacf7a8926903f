"""Compile a large model's training step for a machine you do not have: does it fit, how much does it send, and how
fast could it be?

--technique also compiles it with random-LTD, a sequence-length curriculum or a 1-bit optimizer, and --decode compiles
the decoding of one token. The step is the same as in small runs, with the same sharding rules. The compiler is that
of the machine: libtpu, or XLA for an H100 (aot-requirements.txt installs both; no accelerator is needed).

Memory and traffic are the compiler's figures. Times are estimates that were not confirmed on any machine: the
compiler's cycles, and the bytes that a chip sends at the bandwidth of its specification, once overlapped and once in
sequence.

    python -m effscale.plan
    python -m effscale.plan --model gpt3-175b opt-66b --topology v5p:8x8x8
    python -m effscale.plan --tensor 4 8 16 --accumulate 2 4    # all combinations, compared
    python -m effscale.plan --preset techniques                 # with and without each technique
    python -m effscale.plan --technique --decode bfloat16 int8 --topology v5p:2x2x2 --tensor 8
    python -m effscale.plan --model bloom-7b1 --topology 64xH100 --batch-size 512 --tensor 1
"""

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from effscale.command.folder import Result, check_folder, finish, open_folder, release, resumable
from effscale.command.line import messages, parse
from effscale.parallel.machines import machine
from effscale.plan.cases import Case
from effscale.plan.config import FREE, PRESETS, Config


def run(config: Config) -> Result:
    """Compile the cases of ``config`` and fill the run folder.

    Args:
        config: Options of the run.

    Returns:
        The named figures of each model's fastest case that fits, or of its smallest case if none fits.

    Raises:
        ValueError: ``resume`` is set and the folder has another config, or all cases need more memory than a chip
            has.
        FileExistsError: ``out`` already contains a run and ``resume`` is not set.
        ImportError: The compiler of the machine is not installed.
        RuntimeError: A case does not compile; the compiler's message is in the error.
    """
    # Imports that only a run needs are here, so that --help is fast.
    from effscale.plan import comparison, report
    from effscale.plan.estimate import estimate

    check_folder(config, FREE)
    _check_compiler(config)
    began = time.perf_counter()
    folder = open_folder(config, "scale")
    with resumable(folder):
        found = _compile_all(list(config.cases()), folder.path / "cases")
    refused = {name: one["refused"] for name, one in found.items() if "refused" in one}
    estimates = [
        estimate(case, found[case.name], data_bandwidth=config.data_bandwidth)
        for case in config.cases()
        if case.name not in refused
    ]
    if not estimates:
        reasons = "\n".join(f"{name}: {words}" for name, words in refused.items())
        release(folder)
        raise ValueError(
            f"no case fits into a chip of {config.topology}. Increase accumulate, tensor or the number of chips:\n{reasons}"
        )
    plain = [e for e in estimates if e.case.decode is None and e.case.technique == "none"]
    decoding = [e for e in estimates if e.case.decode is not None]
    rows = comparison.compared(config, found) if len(config.technique) > 1 else []
    figures, tables = {}, {}
    if plain:
        if len(plain) > 1:  # a single point compares nothing
            report.draw(folder.figures / "scale.png", config, plain)
        figures, tables = report.figures(plain, found), report.tables(config, plain, found)
    if rows:
        figures |= comparison.technique_figures(rows)
        tables["A step with and without each technique"] = comparison.technique_table(rows)
    if decoding:
        figures |= comparison.decoding_figures(decoding)
        title = f"Decoding with {config.decode_rows} rows on {config.topology}, estimated"
        tables[title] = comparison.decoding_table(decoding, found)
    if refused:
        tables["Does not compile"] = [["case", "reason"], *map(list, refused.items())]
    return finish(folder, "scale", figures, tables, began=began)


def _compile_all(cases: Sequence[Case], kept: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Return the results of the compilations by case. Each is saved to a file when it is done, and loaded from there by the next call."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from effscale.training.serialize import write_json

    kept.mkdir(exist_ok=True)
    console = Console(file=sys.stderr)
    columns = ("{task.completed}/{task.total}", BarColumn(), "{task.description}")
    bar = Progress(
        *(TextColumn(column) if isinstance(column, str) else column for column in columns),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=not console.is_terminal,
    )
    found = {}
    with bar:
        task = bar.add_task("", total=len(cases))
        for number, case in enumerate(cases, 1):
            file = kept / f"{case.name}.json"
            if not file.is_file():
                bar.update(task, description=case.name)
                if not console.is_terminal:
                    words = f"{number}/{len(cases)} {case.name}: compiling"
                    print(words, file=sys.stderr, flush=True)
                write_json(file, compiled(case))
            found[case.name] = json.loads(file.read_text(encoding="utf-8"))
            bar.advance(task)
    return found


def compiled(case: Case) -> dict[str, object]:
    """Compile a case in a separate process and return the results; see ``effscale.plan.worker``.

    Raises:
        RuntimeError: The case does not compile.
    """
    from effscale.plan.worker import MARK

    done = subprocess.run(
        [sys.executable, "-m", "effscale.plan.worker"],
        input=json.dumps(dataclasses.asdict(case)),
        env=machine(case.topology).target.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    tail = "\n".join(done.stderr.splitlines()[-12:])
    raise RuntimeError(f"{case.name} does not compile for {case.topology}:\n{tail}")


def _check_compiler(config: Config) -> None:
    needed = "jax_cuda13_plugin" if machine(config.topology).chip.name == "H100" else "libtpu"
    if importlib.util.find_spec(needed) is None:
        raise ImportError(
            f"compiling for {config.topology} needs {needed}: install it with pip install --no-deps --requirement aot-requirements.txt",
            name=needed,
        )


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see ``--help``."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # only the compilers are needed, not an accelerator
    with messages():
        run(parse(PRESETS, __doc__ or "", argv, name="python -m effscale.plan"))
