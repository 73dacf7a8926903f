"""A large model's training step, compiled for a machine that is not here: does it fit, what does it send, how fast may it be?

With --technique also with random-LTD, a curriculum of lengths or a 1-bit optimizer, and with --decode the decoding of one token. The step is the one that small runs take, with the same rules of sharding. The compiler is the machine's own: libtpu's, or XLA's for an H100 (aot-requirements.txt installs
both; no accelerator is needed). Memory and traffic are the compiler's figures. Times are estimates, which no machine has confirmed: the compiler's
cycles, the bytes that a chip sends at its maker's bandwidth, and both once overlapped and once in turn.

    python -m effscale.experiments.scale
    python -m effscale.experiments.scale --model gpt3-175b opt-66b --topology v5p:8x8x8
    python -m effscale.experiments.scale --tensor 4 8 16 --accumulate 2 4    # all combinations, and which of them are worth it
    python -m effscale.experiments.scale --preset techniques                 # with and without each technique
    python -m effscale.experiments.scale --technique --decode bfloat16 int8 --topology v5p:2x2x2 --tensor 8
    python -m effscale.experiments.scale --model bloom-7b1 --topology 64xH100 --batch-size 512 --tensor 1
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

from effscale.experiments.scale.cases import Case
from effscale.experiments.scale.config import FREE, PRESETS, Config
from effscale.experiments.scale.machines import machine
from effscale.experiments.shared.cli import messages, parse
from effscale.experiments.shared.prepared import check_folder, resumable
from effscale.experiments.shared.results import Result, finish


def run(config: Config) -> Result:
    """Compiles the cases of ``config`` and fills the run folder.

    Args:
        config: What to do.

    Returns:
        The named figures: of each model's fastest case that fits, or of its smallest where none does.

    Raises:
        ValueError: ``resume`` is set and the folder is of another config; or the compiler refuses all cases, because they need more memory than a chip has.
        FileExistsError: ``out`` already holds a run and ``resume`` is not set.
        ImportError: The machine's compiler is not installed.
        RuntimeError: A case does not compile; the compiler's message is in the error.
    """
    # Importing what only a run needs here keeps --help quick.
    from effscale.experiments.scale import comparison, report
    from effscale.experiments.scale.estimate import estimate
    from effscale.training import RunFolder

    check_folder(config, FREE)
    _check_compiler(config)
    began = time.perf_counter()
    folder = RunFolder.create(config.out, name="scale", config=config, resume=config.resume)
    with resumable(folder):
        found = _compile_all(list(config.cases()), folder.path / "cases")
    refused = {name: told["refused"] for name, told in found.items() if "refused" in told}
    estimates = [
        estimate(case, found[case.name], data_bandwidth=config.data_bandwidth)
        for case in config.cases()
        if case.name not in refused
    ]
    if not estimates:
        told = "\n".join(f"{name}: {words}" for name, words in refused.items())
        folder.close()
        raise ValueError(
            f"no case fits into a chip of {config.topology}; more accumulate, tensor or chips would do\n{told}"
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
        tables["Refused by the compiler"] = [["case", "because"], *map(list, refused.items())]
    return finish(folder, "scale", figures, tables, began=began)


def _compile_all(cases: Sequence[Case], kept: pathlib.Path) -> dict[str, dict[str, Any]]:
    """What the compilations found, by case; each is kept in a file as soon as it is there, and taken from there by the next call."""
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
    """What a process of its own finds when it compiles a case; see `effscale.experiments.scale.worker`.

    Raises:
        RuntimeError: It does not compile.
    """
    from effscale.experiments.scale.worker import MARK

    done = subprocess.run(
        [sys.executable, "-m", "effscale.experiments.scale.worker"],
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
            f"compiling for {config.topology} needs {needed}: pip install --no-deps --requirement aot-requirements.txt",
            name=needed,
        )


def main(argv: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # the compilers are here, and no accelerator
    with messages():
        run(parse(PRESETS, __doc__ or "", argv, name="python -m effscale.experiments.scale"))
