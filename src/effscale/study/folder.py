"""The run folder of a study: its options, and the named figures, tables and plots that it gets at the end."""

import dataclasses
import math

from effscale.command.folder import OutputPart, Result, finish
from effscale.options import PositiveInt
from effscale.study.plots import draw
from effscale.study.study import Results
from effscale.study.table import Interval, Table
from effscale.training import RunFolder


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyPart(OutputPart):
    """What every study has as options."""

    arms: tuple[str, ...] | None = None
    """The arms to train; None trains all. An arm that another needs must be among them."""
    seeds: PositiveInt = 3
    """Number of runs of each arm. Seeds 0, 1, ... decide everything random."""
    jobs: PositiveInt = 1
    """Number of processes, each pinned to its share of the cores, that the arms are divided over."""


FREE = (*(field.name for field in dataclasses.fields(StudyPart)), "cache")
"""Fields of a study that can change when it is resumed."""


def report(results: Results, folder: RunFolder, *, began: float) -> Result:
    """Write ``table.csv``, the plots, ``results.json`` and ``report.md``, print the tables, and close the run folder.

    Args:
        results: The results.
        folder: The run folder.
        began: ``time.perf_counter()`` at the start of the call.
    """
    study, table = results.study, results.table
    table.write(folder.path / "table.csv")
    draw(folder.figures, study.plots, results)
    figures = named_figures(results)
    if study.figures is not None:
        figures |= study.figures(results)
    seeds = {
        f"{name}_{study.metric}": list(table.values(name, study.metric).values())
        for name in study.arms
    }
    return finish(folder, study.name, figures, tables(results), seeds=seeds, began=began)


def named_figures(results: Results) -> dict[str, float | None]:
    """Return ``<arm>_<metric>`` for every metric, and for that of the study its interval and its difference from the arm it is compared with."""
    study, table = results.study, results.table
    named: dict[str, float | None] = {}

    def add(name: str, found: Interval) -> None:
        for suffix, value in zip(("", "_low", "_high"), found, strict=True):
            named[name + suffix] = None if math.isnan(value) else value

    for name in study.arms:
        for metric in table.metrics(name):
            mean = table.interval(name, metric).mean
            named[f"{name}_{metric}"] = None if math.isnan(mean) else mean
        add(f"{name}_{study.metric}", table.interval(name, study.metric))
        if (other := study.against(name)) is not None:
            add(f"{name}_{study.metric}_difference", table.difference(name, other, study.metric))
    for name, found in results.found.items():
        named[f"{name}_learning_rate"] = found.best.learning_rate
        named[f"{name}_warmup"] = found.best.warmup
        named[f"{name}_search_runs"] = len(found.losses)
        named[f"{name}_search_settled"] = int(found.settled)
    return named


def tables(results: Results) -> dict[str, list[list[str]]]:
    """Return the tables by title: arms, pairs and searches."""
    study, table = results.study, results.table
    mean = f"{study.metric} [95 % interval over {results.seeds} seeds]"
    rows = [["arm", mean, "minus", "difference [95 % interval]", *study.columns.values()]]
    for name, arm in study.arms.items():
        other = study.against(name)
        about = "" if other is None else study.arms[other].about
        change = "" if other is None else _difference(table, name, other, study.metric)
        costs = [_count(table.interval(name, metric).mean) for metric in study.columns]
        rows.append([arm.about, table.interval(name, study.metric).text(), about, change, *costs])
    shown = {"Arms": rows}
    pairs = [
        [about, _difference(table, first, second, study.metric)]
        for first, second, about in study.pairs
        if first in study.arms and second in study.arms
    ]
    if pairs:
        shown["Pairs"] = [["what is compared", f"difference in {study.metric}"], *pairs]
    if any(found.losses for found in results.found.values()):
        heading = ["arm", "learning rate", "warmup", study.metric, "runs", "neighbors"]
        shown["Search: the best point of each arm"] = [heading] + [
            [
                study.arms[name].about,
                f"{found.best.learning_rate:g}",
                f"{found.best.warmup}",
                f"{found.losses.get(found.best, math.nan):.4f}",
                f"{len(found.losses)}",
                "all worse" if found.settled else "not all tried",
            ]
            for name, found in results.found.items()
        ]
    return shown


def _difference(table: Table, first: str, second: str, metric: str) -> str:
    return table.difference(first, second, metric).text(sign=True)


def _count(value: float) -> str:
    """Return a cost with three digits or, if it is large, as a whole number."""
    if math.isnan(value):
        return "n/a"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"
