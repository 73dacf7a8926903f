"""Figures: one style for all, drawn from the records of a run so that they can be drawn again."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from effscale.atomic import full_disk_errors
from effscale.extras import require
from effscale.training.metrics import read_jsonl

Records = Sequence[Mapping[str, Any]]

# Okabe and Ito's colors, which color-blind readers can distinguish.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

STYLE = {
    "figure.figsize": (7.0, 4.0),
    "figure.dpi": 120,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "font.size": 10,
}


def records_of(place: pathlib.Path) -> Records:
    """Return the records of a run's ``metrics.jsonl``; none if there is no such file."""
    path = place / "metrics.jsonl"
    return read_jsonl(path) if path.is_file() else []


def series(records: Records, name: str, over: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """Return the values of ``over`` and of ``name`` in the records that have both."""
    pairs = [
        (r[over], r[name]) for r in records if r.get(name) is not None and r.get(over) is not None
    ]
    x, y = zip(*pairs, strict=True) if pairs else ((), ())
    return np.asarray(x, float), np.asarray(y, float)


def curves_of(records: Sequence[Records], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps at which a metric was recorded, and its values of shape ``(seeds, steps)``; NaN after an early end."""
    each = [dict(zip(*(x.tolist() for x in series(r, metric)), strict=True)) for r in records]
    steps = sorted({step for values in each for step in values})
    rows = [[values.get(step, np.nan) for step in steps] for values in each]
    return np.array(steps), np.array(rows, np.float64).reshape(len(records), len(steps))


def cost_of_reaching(loss: float, losses: np.ndarray, costs: np.ndarray) -> float | None:
    """Return the cost until a curve falls to a loss, interpolated between evaluations; None if it never does.

    Example:
        >>> losses, costs = np.array([4.0, 3.0, 2.0]), np.array([10.0, 20.0, 30.0])
        >>> cost_of_reaching(2.5, losses, costs), cost_of_reaching(4.5, losses, costs), cost_of_reaching(1.9, losses, costs)
        (25.0, 10.0, None)
    """
    below = np.flatnonzero(losses <= loss)
    if not len(below):
        return None
    last = int(below[0])
    if last == 0:
        return float(costs[0])
    share = (losses[last - 1] - loss) / (losses[last - 1] - losses[last])
    return float(costs[last - 1] + share * (costs[last] - costs[last - 1]))


def smooth(values: np.ndarray, span: int) -> np.ndarray:
    """Return an exponential average over about ``span`` values, corrected for the bias at its start."""
    decay, average, out = 1 - 1 / max(span, 1), 0.0, []
    for i, value in enumerate(values, 1):
        average = decay * average + (1 - decay) * value
        out.append(average / (1 - decay**i))
    return np.asarray(out)


def band(
    axes: Any,
    x: np.ndarray,
    curves: Sequence[np.ndarray] | np.ndarray,
    *,
    color: str,
    label: str | None = None,
    **style: Any,
) -> None:
    """Draw the mean over seeds as a line and the range of the seeds as a band.

    Values that are not finite are left out. Curves can end early, such as that of a run that diverged.

    Args:
        axes: Where to draw.
        x: The x coordinates of the values, the same for all seeds.
        curves: One curve per seed, each at most as long as ``x``.
        color: Color of the line and the band.
        label: Name in the legend.
        **style: Passed to ``axes.plot``.
    """
    values = np.full((len(curves), len(x)), np.nan)
    for row, curve in zip(values, curves, strict=True):
        row[: len(curve)] = curve
    values[~np.isfinite(values)] = np.nan
    known = np.isfinite(values).any(axis=0)
    x, values = np.asarray(x)[known], values[:, known]
    axes.plot(x, np.nanmean(values, axis=0), color=color, label=label, **style)
    low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
    axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)


def loss_curve(
    path: pathlib.Path,
    records: Records,
    *,
    title: str | None = None,
    levels: Mapping[str, float] | None = None,
) -> None:
    """Draw training and validation loss over the tokens seen, with named levels to compare them with.

    Args:
        path: The PNG to write.
        records: Records of ``metrics.jsonl``, with ``loss`` and ``tokens``, and ``part_val_loss`` or ``val_loss`` if the run
            evaluates.
        title: Title of the figure.
        levels: Horizontal lines by name.
    """
    seen = dict(zip(*(x.tolist() for x in series(records, "tokens")), strict=True))
    partial = any("part_val_loss" in record for record in records)
    with drawn(path) as axes:
        tokens, loss = series(records, "loss", "tokens")
        axes.plot(tokens / 1e6, loss, color=COLORS[0], alpha=0.25, linewidth=0.8)
        axes.plot(tokens / 1e6, smooth(loss, 10), color=COLORS[0], label="training")
        steps, loss = series(records, "part_val_loss" if partial else "val_loss")
        if len(steps):
            tokens = np.array([seen.get(step, np.nan) for step in steps.tolist()])
            label = "part of the held-out data" if partial else "held-out data"
            axes.plot(tokens / 1e6, loss, "o-", color=COLORS[1], markersize=4, label=label)
        for color, (name, level) in zip(COLORS[2:], (levels or {}).items(), strict=False):
            axes.axhline(level, color=color, linestyle="--", linewidth=1, label=name)
        axes.set(xlabel="tokens seen (millions)", ylabel="loss", title=title)
        axes.legend()


def speed_curve(path: pathlib.Path, timing: Records, *, title: str) -> None:
    """Draw tokens per second over steps, from ``timing.jsonl``."""
    with drawn(path, figsize=(7.0, 2.6)) as axes:
        steps, speed = series(timing, "tokens_per_second")
        axes.plot(steps, speed / 1e3, color=COLORS[2])
        axes.set(xlabel="step", ylabel="thousand tokens per second", title=title, ylim=(0, None))


@contextlib.contextmanager
def drawn(path: pathlib.Path, **options: Any) -> Iterator[Any]:
    """Write a PNG of what the block draws on the axes that it gets.

    Args:
        path: The file.
        **options: Passed to ``matplotlib.pyplot.subplots``.
    """
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(**options)
        yield axes
        figure.tight_layout()
        with full_disk_errors(path):
            figure.savefig(path)
        plt.close(figure)


def shrink(path: pathlib.Path) -> None:
    """Reduce a PNG to 64 colors, which are enough and take about half the bytes."""
    from PIL import Image  # a dependency of matplotlib

    with Image.open(path) as image:
        image.quantize(64).save(path, optimize=True)


def pyplot() -> Any:
    """Return ``matplotlib.pyplot``, set up to draw to files."""
    require("figures", "matplotlib")
    import matplotlib  # slow to import, and only figures need it

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
