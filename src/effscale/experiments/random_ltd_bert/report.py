"""Results specific to ``random_ltd_bert``: the search for each arm, and the first steps at a high learning rate."""

import math
from collections.abc import Mapping

import numpy as np

from effscale.experiments.shared.random_ltd.report import NAMES, quality_figures, quality_rows
from effscale.study.search import Found


def search_figures(found: Mapping[str, Found]) -> dict[str, float | int]:
    """Return each arm's learning rate and warmup, the number of runs of the search, and whether all neighbors were tried."""
    named: dict[str, float | int] = {}
    for arm, each in found.items():
        named[f"{arm}_learning_rate"] = each.best.learning_rate
        named[f"{arm}_warmup_steps"] = each.best.warmup
        named[f"{arm}_search_runs"] = len(each.losses)
        named[f"{arm}_search_settled"] = int(each.settled)
    return named


def search_rows(found: Mapping[str, Found]) -> list[list[str]]:
    """Return a heading and one row per arm: the result of the search."""
    rows = [["arm", "learning rate", "warmup steps", "loss", "runs", "all neighbors tried"]]
    for arm, each in found.items():
        point = [f"{each.best.learning_rate:g}", str(each.best.warmup)]
        settled = "yes" if each.settled else "no"
        rows.append(
            [NAMES[arm], *point, _shown(each.losses.get(each.best)), str(len(each.losses)), settled]
        )
    return rows


def tried_rows(found: Mapping[str, Found]) -> list[list[str]]:
    """Return a heading and one row per pair of learning rate and warmup that was tried: the loss of each arm.

    Example:
        >>> from effscale.study.search import Point
        >>> losses = {Point(1e-3, 60): 4.8, Point(2e-3, 60): float("inf")}
        >>> found = {"baseline": Found(best=Point(1e-3, 60), losses=losses, settled=False)}
        >>> tried_rows(found)[1:]
        [['0.001', '60', '4.8000'], ['0.002', '60', 'diverged']]
    """
    rows = [["learning rate", "warmup steps", *(NAMES[arm] for arm in found)]]
    for point in sorted({point for each in found.values() for point in each.losses}):
        losses = [_shown(each.losses.get(point)) for each in found.values()]
        rows.append([f"{point.learning_rate:g}", str(point.warmup), *losses])
    return rows


def early_figures(
    losses: Mapping[str, np.ndarray], entropy: float
) -> dict[str, float | int | None]:
    """Return each arm's loss after the first steps, and how many of its runs are not below the entropy of the token frequencies.

    Args:
        losses: The loss of each seed, by arm; infinite if the run diverged, and then means over it are None.
        entropy: The lowest possible loss without context.

    Example:
        >>> losses = {"baseline": np.array([5.0, 5.4]), "random_ltd": np.array([5.0, np.inf])}
        >>> figures = early_figures(losses, 5.3)
        >>> figures["baseline_early_val_loss"], figures["random_ltd_early_val_loss"]
        (5.2, None)
        >>> figures["baseline_early_not_below_entropy"], figures["random_ltd_early_not_below_entropy"]
        (1, 1)
    """
    if not any(len(each) for each in losses.values()):
        return {}
    with np.errstate(invalid="ignore"):  # the difference of infinite losses
        means = quality_figures(losses, "early_val_loss")
    named: dict[str, float | int | None] = {
        name: value if math.isfinite(value) else None for name, value in means.items()
    }
    for arm, each in losses.items():
        named[f"{arm}_early_not_below_entropy"] = _not_below(each, entropy)
    return named


def early_rows(losses: Mapping[str, np.ndarray], entropy: float) -> list[list[str]]:
    """Return a heading and one row per arm: losses, mean and standard deviation, and the number of runs not below the entropy."""
    with np.errstate(invalid="ignore"):
        (heading, *rows) = quality_rows(losses, decimals=3)
    counts = [str(_not_below(each, entropy)) for each in losses.values()]
    rows = [[*row, count] for row, count in zip(rows, counts, strict=True)]
    return [[*heading, f"runs at {entropy:.3f} or above"], *rows]


def each_seed(values: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, list[float | None]]:
    """Return the value of each seed, by arm and name; None if the run diverged.

    Example:
        >>> each_seed({"val_loss": {"baseline": np.array([4.5, np.inf])}})
        {'baseline_val_loss': [4.5, None]}
    """
    return {
        f"{arm}_{name}": [float(x) if math.isfinite(x) else None for x in each]
        for name, arms in values.items()
        for arm, each in arms.items()
    }


def _not_below(losses: np.ndarray, entropy: float) -> int:
    return int((losses >= entropy).sum())


def _shown(loss: float | None) -> str:
    if loss is None:
        return "n/a"
    return f"{loss:.4f}" if math.isfinite(loss) else "diverged"
