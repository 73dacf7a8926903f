"""The plots of the experiment ``seqlen_curriculum``."""

import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from effscale.curriculum.instability import loss_ratio
from effscale.experiments.seqlen_curriculum.report import Run, title
from effscale.training.plotting import COLORS, STYLE, band, pyplot, shrink, smooth


def training(path: pathlib.Path, runs: Mapping[str, Sequence[Run]]) -> None:
    """Draw the training loss over tokens, averaged over about a fortieth of the run: mean and range of the seeds."""

    def draw(axes: Any) -> None:
        for color, name, seeds in _arms(runs):
            curves = [_smoothed(run.losses, max(1, run.arm.num_steps // 40)) for run in seeds]
            _draw_steps(axes, seeds, curves, color=color, label=name, lw=1.3)
        axes.set(xlabel="tokens (millions)", ylabel="training loss (nats per token)")
        axes.legend()

    _drawn(path, draw, size=(6.5, 3.6))


def instability(path: pathlib.Path, runs: Mapping[str, Sequence[Run]]) -> None:
    """Draw pooled loss ratio, variance norm and variance maximum over tokens: mean and range of the seeds."""
    panels = {
        "loss_ratio": "loss ratio, pooled",
        "variance_norm": "variance norm",
        "variance_max": "variance maximum",
    }

    def draw(axes: Any) -> None:
        for panel, (name, label_y) in zip(axes, panels.items(), strict=True):
            for color, label, seeds in _arms(runs):
                style = {"color": color, "lw": 1.0, "label": label}
                if name == "loss_ratio":
                    curves = [loss_ratio(run.pooled_losses()) for run in seeds]
                    stretches = 1 + np.arange(max(map(len, curves)))
                    band(panel, stretches * seeds[0].window / 1e6, curves, **style)
                else:
                    _draw_steps(panel, seeds, [run.steps(name) for run in seeds], **style)
            panel.set(ylabel=label_y, xscale="log")
        threshold = runs["small"][0].threshold
        axes[0].axhline(threshold, color=COLORS[-1], ls=":", lw=1, label="threshold")
        axes[0].legend()
        axes[-1].set(xlabel="tokens (millions)")

    _drawn(path, draw, size=(6.5, 7.2), rows=3, sharex=True)


def validation(path: pathlib.Path, runs: Mapping[str, Sequence[Run]]) -> None:
    """Draw validation loss over tokens and over seconds of training steps: mean and range of the seeds."""

    def draw(axes: Any) -> None:
        for color, name, seeds in _arms(runs):
            # A run that diverged has evaluations at the first steps of the others.
            evaluated = [run.evaluations() for run in seeds]
            steps = max((steps for steps, _ in evaluated), key=len)
            curves = [losses for _, losses in evaluated]
            style = {"color": color, "marker": ".", "ms": 4, "lw": 1.3, "label": name}
            band(axes[0], seeds[0].tokens_at(steps) / 1e6, curves, **style)
            band(axes[1], seeds[0].seconds_at(steps), curves, **style)
        level = np.mean([run.last_loss for run in runs["small"]])
        for panel in axes:
            panel.axhline(level, color=COLORS[-1], ls=":", lw=1)
        axes[0].set(xlabel="tokens (millions)", ylabel="validation loss (nats per token)")
        axes[1].set(xlabel="seconds of training steps")
        axes[0].legend()

    _drawn(path, draw, size=(8.0, 3.6), columns=2, sharey=True)


def learning_rates(
    path: pathlib.Path, runs: Mapping[str, Sequence[Run]], named: Mapping[str, Any]
) -> None:
    """Plot final validation loss, largest pooled loss ratio and variance maximum by the multiple of the learning rate."""
    panels = {
        "val_loss": "last validation loss (nats per token)",
        "greatest_pooled_loss_ratio": "greatest loss ratio, pooled",
        "variance_max": "variance maximum",
    }

    def draw(axes: Any) -> None:
        for panel, (name, label_y) in zip(axes, panels.items(), strict=True):
            for color, kind in zip(COLORS[1:], ("large_x", "large_curriculum_x"), strict=False):
                arms = [arm for arm in runs if arm.startswith(kind)]
                # An arm that diverged with all seeds has no loss to show.
                points = [
                    (runs[arm][0].arm.factor, named[f"{arm}_{name}"], named[f"{arm}_{name}_std"])
                    for arm in arms
                    if named[f"{arm}_{name}"] is not None
                ]
                if points:
                    x, y, spread = zip(*sorted(points), strict=True)
                    label = "short first" if "curriculum" in kind else "rows of full length"
                    panel.errorbar(
                        x, y, spread, color=color, marker="o", ms=4, lw=1, capsize=3, label=label
                    )
            panel.axhline(
                named[f"small_{name}"], color=COLORS[0], ls=":", lw=1, label="small batch"
            )
            panel.set_xscale("log", base=2)
            panel.set(xlabel="learning rate (multiple of L)", ylabel=label_y)
            panel.xaxis.set_major_formatter("{x:g}")
        axes[0].legend()

    _drawn(path, draw, size=(9.5, 3.3), columns=3)


def _arms(runs: Mapping[str, Sequence[Run]]) -> Iterator[tuple[str, str, Sequence[Run]]]:
    """Yield the runs of each arm with its color and its name."""
    for color, (arm, seeds) in zip(COLORS, runs.items(), strict=False):
        yield color, title(arm), seeds


def _draw_steps(
    axes: Any, seeds: Sequence[Run], curves: Sequence[np.ndarray], **style: Any
) -> None:
    """Draw values of each step over tokens."""
    steps = 1 + np.arange(max(map(len, curves)))
    band(axes, seeds[0].tokens_at(steps) / 1e6, curves, **style)


def _smoothed(losses: np.ndarray, span: int) -> np.ndarray:
    """Return an exponential average; values that are not finite stay NaN."""
    there = np.isfinite(losses)
    averaged = np.full(len(losses), np.nan)
    averaged[there] = smooth(losses[there], span)
    return averaged


def _drawn(
    path: pathlib.Path,
    draw: Callable[[Any], None],
    *,
    size: tuple[float, float],
    rows: int = 1,
    columns: int = 1,
    **options: Any,
) -> None:
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=size, dpi=100, **options)
        draw(axes)
        figure.tight_layout()
        figure.savefig(path)
        plt.close(figure)
    shrink(path)
