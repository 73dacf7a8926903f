"""The figures of a study: curves, final values, and final values over a cost."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from effscale.training.plotting import COLORS, Records, band, curves_of, drawn, series, shrink


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure of a study."""

    name: str
    """The name of the PNG, without its ending."""

    def draw(self, axes: Any, results: Any) -> None:
        """Draw the results on axes of matplotlib."""
        raise NotImplementedError

    def size(self, results: Any) -> tuple[float, float]:
        """Return width and height in inches."""
        return 7.0, 4.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curves(Plot):
    """A metric over the course of training: the mean over seeds, with their range as a band."""

    metric: str = "part_val_loss"
    """The metric, from ``metrics.jsonl``."""
    over: str = "step"
    """What the horizontal axis counts: ``step``, another metric of the same records, or a metric of the table that grows evenly with the
    steps, such as ``teraflops``."""
    arms: tuple[str, ...] | None = None
    """The arms to draw; None draws all, as far as there are colors."""
    minus: bool = False
    """Whether to draw the difference from the arm that each is compared with."""
    part: str = ""
    """The part of a trial whose metrics are drawn."""
    labels: tuple[str, str] | None = None
    """Labels of the axes; None uses the names."""

    def draw(self, axes: Any, results: Any) -> None:
        """Draw the curves."""
        wanted = list(results.study.arms) if self.arms is None else self.arms
        for color, arm in zip(COLORS, [a for a in wanted if a in results.study.arms], strict=False):
            records = results.records(arm, self.part)
            steps, curves = curves_of(records, self.metric)
            if self.minus:
                other = results.study.against(arm)
                if other is None:
                    continue
                against = curves_of(results.records(other, self.part), self.metric)[1]
                count = min(curves.shape[1], against.shape[1])
                steps, curves = steps[:count], curves[:, :count] - against[:, :count]
            if not len(steps):
                continue
            look = {"color": color, "label": results.study.arms[arm].about}
            if len(steps) < 20:  # a single point has no line
                look["marker"] = "."
            band(axes, self._costs(results, arm, records, steps), curves, **look)
        x, y = self.labels or (self.over, self.metric)
        axes.set(xlabel=x, ylabel=y)
        if axes.lines:
            axes.legend(fontsize=8)
        if self.minus:
            axes.axhline(0, color="black", ls=":", lw=1)

    def _costs(self, results: Any, arm: str, records: Sequence[Records], steps: np.ndarray) -> Any:
        if self.over == "step":
            return steps
        known = dict(zip(*(x.tolist() for x in series(records[0], self.over)), strict=True))
        if known:
            return np.array([known.get(step, np.nan) for step in steps.tolist()])
        return results.table.interval(arm, self.over).mean * steps / steps[-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finals(Plot):
    """The final value of each arm: a dot per seed, and a line at the mean."""

    metric: str | None = None
    """The metric; None takes that of the study."""
    label: str | None = None
    """Label of the axis; None uses the name of the metric."""

    def size(self, results: Any) -> tuple[float, float]:
        """Return width and height in inches."""
        return 7.5, 0.34 * len(results.study.arms) + 1.1

    def draw(self, axes: Any, results: Any) -> None:
        """Draw the dots."""
        metric = self.metric or results.study.metric
        names = list(results.study.arms)
        for place, name in enumerate(names):
            values = list(results.table.values(name, metric).values())
            axes.plot(values, [place] * len(values), "o", color=COLORS[0], alpha=0.5, ms=5)
            if values:
                axes.vlines(np.mean(values), place - 0.3, place + 0.3, color=COLORS[0], lw=2)
        axes.set_yticks(range(len(names)), [results.study.arms[name].about for name in names])
        axes.invert_yaxis()
        axes.set(xlabel=self.label or metric)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tradeoff(Plot):
    """The final value of each arm over a cost, with confidence intervals."""

    over: str
    """The metric of the cost."""
    metric: str | None = None
    """The metric; None takes that of the study."""
    arms: tuple[str, ...] | None = None
    """The arms to draw; None draws all."""
    logarithmic: bool = False
    """Whether the axis of the cost is logarithmic."""
    labels: tuple[str, str] | None = None
    """Labels of the axes; None uses the names."""

    def draw(self, axes: Any, results: Any) -> None:
        """Draw a point per arm."""
        metric = self.metric or results.study.metric
        arms = {n: a for n, a in results.study.arms.items() if self.arms is None or n in self.arms}
        colors = [COLORS[i % len(COLORS)] for i in range(len(arms))]
        for color, (name, arm) in zip(colors, arms.items(), strict=True):
            mean, low, high = results.table.interval(name, metric)
            cost = results.table.interval(name, self.over).mean
            error = None if np.isnan(low) else [[mean - low], [high - mean]]
            axes.errorbar(cost, mean, error, fmt="o", color=color, capsize=3, label=arm.about)
        x, y = self.labels or (self.over, metric)
        axes.set(xlabel=x, ylabel=y, xscale="log" if self.logarithmic else "linear")
        axes.legend(fontsize=8)


def draw(folder: pathlib.Path, plots: Sequence[Plot], results: Any) -> None:
    """Write ``<name>.png`` of each plot."""
    for plot in plots:
        path = folder / f"{plot.name}.png"
        with drawn(path, figsize=plot.size(results), dpi=100) as axes:
            plot.draw(axes, results)
        shrink(path)
