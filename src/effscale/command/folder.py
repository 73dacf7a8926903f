"""The run folder of a command: its options, checks before work begins, what is said after a stop, and the results."""

import contextlib
import dataclasses
import pathlib
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from effscale.command.terminal import show_rows, titled
from effscale.options import Options, check
from effscale.parallel.peers import on_first
from effscale.paths import is_url
from effscale.training import MirrorError, RunFolder
from effscale.training.errors import StoppedBySignal
from effscale.training.mirror import OWNER
from effscale.training.run_folder import check_unused
from effscale.training.serialize import differences, to_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputPart(Options):
    """The output of a run; every config includes this part."""

    out: pathlib.Path | None = None
    """Run folder; the default is runs/<experiment>/<time>."""
    resume: bool = False
    """Resume the run in --out: finished runs are kept, and the last one continues from its checkpoint."""
    mirror: str | None = None
    """URL of a copy of the run folder, updated every minute, such as s3://bucket/runs/a. effscale.training.fetch_run copies it back."""

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            self.mirror is None or is_url(self.mirror),
            "mirror",
            "a URL such as s3://bucket/runs/a",
        )
        resumable = not (self.resume and self.out is None)
        check(self, resumable, "resume", "set together with --out, the folder to resume")


OUTPUT = tuple(field.name for field in dataclasses.fields(OutputPart))
"""Fields that can change when a run is resumed."""


def check_folder(config: OutputPart, free: Sequence[str]) -> None:
    """Check that ``config.out`` is unused or, with ``config.resume``, contains a run of the same config that no
    process is writing.

    Args:
        config: Config of the experiment.
        free: Fields that may differ.

    Raises:
        ValueError: The folder has another config.
        FileExistsError: The folder contains a run and ``resume`` is not set.
        FileNotFoundError: There is no run to resume.
        LockedError: Another process is writing to the folder.
    """
    if not config.resume:
        if config.out is not None:
            on_first(lambda: check_unused(config.out))
        return
    with RunFolder.create(config.out, resume=True) as folder:
        saved = folder.config()
    if config.mirror is None and (folder.path / OWNER).exists():
        print(
            f"warning: the copy of {folder.path} is not updated, because --mirror is not set",
            file=sys.stderr,
        )
    found = [
        f"{name}: {there!r} saved, {here!r} given"
        for name, (there, here) in differences(saved, to_json(config)).items()
        if name.partition(".")[0] not in free
    ]
    if found:
        raise ValueError(
            f"{folder.path}: has another config ({'; '.join(found)}). Resume with the saved values, or start a new run folder"
        )


def open_folder(config: OutputPart, name: str, data: Mapping[str, Any] | None = None) -> RunFolder:
    """Create the ``RunFolder`` of a run, or open it to resume.

    Args:
        config: Config of the experiment.
        name: Name of the experiment.
        data: Digests of the run's data, as for ``RunFolder.create``.
    """
    return RunFolder.create(
        config.out,
        name=name,
        config=config,
        data=data,
        resume=config.resume,
        mirror=config.mirror,
    )


@contextlib.contextmanager
def resumable(folder: RunFolder) -> Iterator[None]:
    """Context in which a stop by a signal says how to resume, and in which the run folder is released if the block fails.

    Args:
        folder: The ``RunFolder``.
    """
    try:
        yield
    except StoppedBySignal as stop:
        release(folder)
        message = f"{stop}; to resume, use --out {folder.path} --resume"
        raise StoppedBySignal(message, stop.signal) from None
    except BaseException:
        release(folder)
        raise


def release(folder: RunFolder) -> None:
    """Close the run folder when a run has failed; a copy that cannot be completed is only a warning."""
    try:
        folder.close()
    except MirrorError as error:
        print(f"warning: {error}", file=sys.stderr)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The results of a run."""

    figures: Mapping[str, float | int | None]
    """Figures by name, as in ``results.json``; the experiment's page explains them. None if a figure does not apply."""
    seconds: float
    """Duration of this call."""
    peak_memory_mb: float
    """Peak resident memory of the process."""
    folder: str
    """The run folder."""


def finish(
    folder: RunFolder,
    name: str,
    figures: Mapping[str, float | int | None],
    tables: Mapping[str, Sequence[Sequence[str]]],
    *,
    began: float,
    seeds: Mapping[str, Sequence[float | None]] | None = None,
    left: int = 1,
    text: str = "",
) -> Result:
    """Write ``results.json`` and the report, print the tables, and close the run folder. Plots for the report must
    exist already.

    ``results.json`` contains the named figures, their values by seed under ``seeds``, and the printed tables under
    ``tables``. Pages of the lab book are built from it.

    Args:
        folder: The run folder.
        name: Name of the experiment.
        figures: The named figures.
        tables: Tables by title, each with a heading and rows; without any, the named figures are shown.
        began: ``time.perf_counter()`` at the start of the call.
        seeds: Values of named figures by seed.
        left: Number of text columns in the tables, which are left-aligned.
        text: Markdown to put after the tables of the report.
    """
    result = Result(
        figures=figures,
        seconds=time.perf_counter() - began,
        peak_memory_mb=_peak_memory(),
        folder=str(folder.path),
    )
    call = {
        "seconds": result.seconds,
        "peak_memory_mb": result.peak_memory_mb,
        "folder": result.folder,
    }
    shown = [{"title": title, "left": left, "rows": rows} for title, rows in tables.items()]
    parts = [*(titled(**table) for table in shown), text]
    if jax.process_index() == 0:  # only the first of several processes writes
        folder.write_results({**figures, **call, "seeds": seeds or {}, "tables": shown})
        folder.write_report(name, call if tables else {**figures, **call}, "\n\n".join(parts))
        for title, rows in (tables or {name: _rows(figures)}).items():
            show_rows(title, rows, left=left)
        print(f"run folder: {result.folder}")
    on_first(folder.close)  # the other processes wait for the last copy
    return result


def _rows(figures: Mapping[str, float | int | None]) -> list[list[str]]:
    text = lambda x: f"{x:,.4g}" if isinstance(x, float) and x < 1e4 else f"{x:,.0f}"
    known = {name: value for name, value in figures.items() if value is not None}
    return [["figure", "value"], *([name, text(value)] for name, value in known.items())]


def _peak_memory() -> float:
    """Return the peak resident memory of this process so far, in megabytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
