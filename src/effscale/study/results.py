"""Results of an experiment: named figures and tables, in the run folder and on the screen."""

import dataclasses
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from effscale.parallel.peers import on_first
from effscale.study.host import peak_memory
from effscale.training import RunFolder


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
        peak_memory_mb=peak_memory(),
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


def deviation(values: np.ndarray) -> float:
    """Return the sample standard deviation; 0 for a single value."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def markdown(rows: Sequence[Sequence[str]], *, left: int = 2) -> str:
    """Format a Markdown table with its first ``left`` columns left-aligned.

    Example:
        >>> print(markdown([["task", "by", "mean"], ["digits", "torch", "97.0"]]))
        | task | by | mean |
        |---|---|---:|
        | digits | torch | 97.0 |
    """
    rule = "|" + "---|" * left + "---:|" * (len(rows[0]) - left)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], rule, *lines[1:]])


def titled(title: str, rows: Sequence[Sequence[str]], left: int) -> str:
    """Format a table of ``results.json`` with its title, in Markdown."""
    return f"{title}:\n\n{markdown(rows, left=left)}"


def show_rows(title: str, rows: Sequence[Sequence[str]], *, left: int = 2) -> None:
    """Print the table with its first ``left`` columns left-aligned."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if i < left else "right")
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)
