"""A large model's training step, compiled for a machine that is not here: does it fit, what does it send, how fast may it be?

The step is the one that small runs take, with the same rules of sharding. The compiler is the machine's own: libtpu's, or XLA's for an H100 (aot-requirements.txt installs
both; no accelerator is needed). Memory and traffic are the compiler's figures. Times are estimates, which no machine has confirmed: the compiler's
cycles, the bytes that a chip sends at its maker's bandwidth, and both once overlapped and once in turn.

    python -m effscale.experiments.scale
    python -m effscale.experiments.scale --model gpt3-175b opt-66b --topology v5p:8x8x8
    python -m effscale.experiments.scale --tensor 4 8 16 --accumulate 2 4    # all combinations, and which of them are worth it
    python -m effscale.experiments.scale --model bloom-7b1 --topology 64xH100 --batch-size 512 --tensor 1
"""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import time

from effscale.experiments.scale.config import FREE, PRESETS, Case, Config
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
    from effscale.experiments.scale import report
    from effscale.experiments.scale.estimate import estimate
    from effscale.training import RunFolder
    from effscale.training.serialize import write_json

    check_folder(config, FREE)
    _check_compiler(config)
    began = time.perf_counter()
    folder = RunFolder.create(config.out, name="scale", config=config, resume=config.resume)
    cases, found = list(config.cases()), {}
    (folder.path / "cases").mkdir(exist_ok=True)
    with resumable(folder):
        for number, case in enumerate(cases, 1):
            file = folder.path / "cases" / f"{case.name}.json"
            if not file.is_file():
                print(f"{number}/{len(cases)} {case.name}: compiling", file=sys.stderr, flush=True)
                write_json(file, compiled(case))
            found[case.name] = json.loads(file.read_text(encoding="utf-8"))
    refused = {name: told["refused"] for name, told in found.items() if "refused" in told}
    estimates = [estimate(c, found[c.name]) for c in cases if c.name not in refused]
    if not estimates:
        told = "\n".join(f"{name}: {words}" for name, words in refused.items())
        folder.close()
        raise ValueError(
            f"no case fits into a chip of {config.topology}; more accumulate, tensor or chips would do\n{told}"
        )
    report.draw(folder.figures / "scale.png", config, estimates)
    tables = report.tables(config, estimates, found)
    if refused:
        tables["Refused by the compiler"] = [["case", "because"], *map(list, refused.items())]
    return finish(folder, "scale", report.figures(estimates, found), tables, began=began)


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
