"""The memory of a study: one long table of arm, seed, metric and value."""

import csv
import dataclasses
import io
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from effscale.training.serialize import write_atomic


class Row(NamedTuple):
    """One value.

    Attributes:
        arm: Name of the arm.
        seed: Seed of the run.
        metric: Name of the metric.
        value: The value; NaN if the run diverged.
    """

    arm: str
    seed: int
    metric: str
    value: float


class Interval(NamedTuple):
    """A mean over seeds with its confidence interval.

    Attributes:
        mean: The mean.
        low: The lower end of the interval; NaN with fewer than two seeds.
        high: The upper end.
    """

    mean: float
    low: float
    high: float

    def text(self, digits: int = 3, sign: bool = False) -> str:
        """Return ``mean [low, high]``, without the interval if there is none, and ``n/a`` for NaN.

        Example:
            >>> Interval(0.5, 0.25, 0.75).text(2), Interval(0.5, math.nan, math.nan).text(2, sign=True)
            ('0.50 [0.25, 0.75]', '+0.50')
        """
        if math.isnan(self.mean):
            return "n/a"
        shown = [f"{value:{'+' if sign else ''},.{digits}f}" for value in self]
        return shown[0] if math.isnan(self.low) else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def interval(values: Iterable[float], confidence: float = 0.95) -> Interval:
    """Return the mean of independent values with its confidence interval by Student's t distribution.

    Example:
        >>> interval([1.0, 2.0, 3.0]).text(2)
        '2.00 [-0.48, 4.48]'
    """
    array = np.array(list(values), np.float64)
    if not len(array):
        return Interval(math.nan, math.nan, math.nan)
    mean = float(array.mean())
    if len(array) < 2 or math.isnan(mean):
        return Interval(mean, math.nan, math.nan)
    error = float(array.std(ddof=1)) / math.sqrt(len(array))
    import scipy.stats  # slow to import  # pyrefly: ignore

    half = float(scipy.stats.t.ppf((1 + confidence) / 2, len(array) - 1)) * error
    return Interval(mean, mean - half, mean + half)


def deviation(values: np.ndarray) -> float:
    """Return the sample standard deviation; 0 for a single value."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


@dataclasses.dataclass(frozen=True)
class Table:
    """All values of a study.

    Example:
        >>> table = Table([Row("plain", 0, "val_loss", 3.0), Row("plain", 1, "val_loss", 5.0),
        ...     Row("short", 0, "val_loss", 2.0), Row("short", 1, "val_loss", 4.5)])
        >>> table.values("plain", "val_loss")
        {0: 3.0, 1: 5.0}
        >>> table.difference("short", "plain", "val_loss").mean
        -0.75
    """

    rows: list[Row]

    def values(self, arm: str, metric: str) -> dict[int, float]:
        """Return an arm's values of a metric by seed."""
        return {r.seed: r.value for r in self.rows if (r.arm, r.metric) == (arm, metric)}

    def metrics(self, arm: str) -> list[str]:
        """Return the names of an arm's metrics."""
        return list(dict.fromkeys(row.metric for row in self.rows if row.arm == arm))

    def interval(self, arm: str, metric: str) -> Interval:
        """Return the mean of an arm's metric over seeds."""
        return interval(self.values(arm, metric).values())

    def difference(self, arm: str, other: str, metric: str) -> Interval:
        """Return the mean over seeds of an arm's metric minus that of another arm with the same seed."""
        first, second = self.values(arm, metric), self.values(other, metric)
        return interval(first[seed] - second[seed] for seed in first if seed in second)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the table as CSV, with the heading ``arm,seed,metric,value``."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows((*row[:3], repr(row.value)) for row in self.rows)
        write_atomic(path, text.getvalue())

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Table":
        """Read a table that ``write`` has written.

        Raises:
            ValueError: The file is not such a table.
        """
        with open(path, encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file))
        if not lines or tuple(lines[0]) != Row._fields:
            raise ValueError(f"{path}: must begin with the heading {','.join(Row._fields)}")
        try:
            return cls([Row(a, int(s), m, float(v)) for a, s, m, v in lines[1:]])
        except ValueError as error:
            raise ValueError(f"{pathlib.Path(path)}: is damaged ({error})") from None


def rows_of(arm: str, seed: int, metrics: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a trial; metrics that are not numbers are left out."""
    number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool)
    return [Row(arm, seed, name, float(x)) for name, x in metrics.items() if number(x)]
