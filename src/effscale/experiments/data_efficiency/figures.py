"""The figures of ``data_efficiency``."""

import pathlib
from typing import Any

import numpy as np

from effscale.experiments.data_efficiency.report import NAMES, Comparison
from effscale.experiments.shared.pretraining_plan import Technique
from effscale.training.plotting import COLORS, STYLE, band, pyplot, shrink

LABELS = {
    "layer_tokens": "layer-averaged tokens (millions)",
    "teraflops": "training operations (10$^{12}$)",
    "seconds": "seconds of training steps",
}
MARKERS = ("s", "^", "D", "v")


def draw(folder: pathlib.Path, comparison: Comparison) -> None:
    """Draw ``curves.png`` and ``budgets.png``.

    Args:
        folder: The folder to write to.
        comparison: The runs.
    """
    plt = pyplot()
    with plt.rc_context(STYLE):
        _curves(plt, folder / "curves.png", comparison)
        _budgets(plt, folder / "budgets.png", comparison)


def _curves(plt: Any, path: pathlib.Path, comparison: Comparison) -> None:
    """Plot validation loss over each cost on the whole budget, with seeds as a band and ends of smaller budgets as marks."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(1, 3, figsize=(11.0, 4.0), dpi=100, sharey=True)
    fractions = sorted({f for _, f in comparison.arms}, reverse=True)
    for name, panel in zip(LABELS, axes, strict=True):
        scale = 1e-6 if name == "layer_tokens" else 1.0
        for (technique, fraction), arm in comparison.arms.items():
            color = COLORS[_techniques(comparison).index(technique)]
            losses = arm.losses()
            costs = scale * np.array([arm.cost_at(int(step), name) for step in arm.steps])
            if fraction == 1.0:
                band(panel, costs, losses, color=color, label=NAMES[technique], marker=".")
            elif len(costs):
                marker = MARKERS[(fractions.index(fraction) - 1) % len(MARKERS)]
                panel.plot(costs[-1], losses[:, -1].mean(), marker, color=color, ms=5)
        if not comparison.baseline.diverged:
            panel.axhline(comparison.target, color="#000000", ls=":", lw=1)
        panel.set(xlabel=LABELS[name])
        panel.xaxis.set_major_locator(MaxNLocator(5))
    for fraction, marker in zip(fractions[1:], MARKERS, strict=False):
        label = f"end, {100 * fraction:g} % of the budget"
        axes[0].plot([], [], marker, color="#888888", ms=5, label=label)
    losses = np.concatenate([arm.losses().ravel() for arm in comparison.arms.values()])
    if not comparison.baseline.diverged:
        low, high = np.nanmin(losses), np.nanmax(losses)
        # The first losses are far above the last ones, which are compared.
        axes[0].set_ylim(
            low - 0.05 * (high - low), comparison.target + 0.5 * (high - comparison.target)
        )
    axes[0].set_ylabel("validation loss (nats per token)")
    axes[0].legend(fontsize=8)
    _save(plt, figure, path)


def _budgets(plt: Any, path: pathlib.Path, comparison: Comparison) -> None:
    """Plot the final loss by fraction of the budget, as the mean with the range over seeds."""
    figure, panel = plt.subplots(figsize=(8.0, 3.6), dpi=100)
    fractions = sorted({f for _, f in comparison.arms})
    techniques = _techniques(comparison)
    for number, technique in enumerate(techniques):
        # Next to each other, so that ranges are visible.
        places = np.arange(len(fractions)) + 0.08 * (number - (len(techniques) - 1) / 2)
        losses = [comparison.arms[technique, f].final_loss for f in fractions]
        mean = np.array([each.mean() for each in losses])
        spread = [mean - [each.min() for each in losses], [each.max() for each in losses] - mean]
        panel.errorbar(
            places,
            mean,
            spread,
            fmt="o-",
            ms=4,
            lw=1,
            capsize=3,
            color=COLORS[number],
            label=NAMES[technique],
        )
    if not comparison.baseline.diverged:
        whole = comparison.baseline.final_loss.mean()
        label = "plain training, whole budget"
        panel.axhline(whole, color="#000000", ls=":", lw=1, label=label)
    panel.set_xticks(np.arange(len(fractions)), [f"{100 * f:g} %" for f in fractions])
    panel.set(xlabel="part of the budget", ylabel="final loss (nats per token)")
    panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(plt, figure, path)


def _techniques(comparison: Comparison) -> list[Technique]:
    return list(dict.fromkeys(technique for technique, _ in comparison.arms))


def _save(plt: Any, figure: Any, path: pathlib.Path) -> None:
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    shrink(path)
