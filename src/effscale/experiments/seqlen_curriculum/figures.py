"""The plots of the experiment ``seqlen_curriculum``."""

import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from effscale.curriculum.instability import loss_ratio
from effscale.experiments.seqlen_curriculum.report import Run
from effscale.experiments.shared.plotting import COLORS, STYLE, pyplot, smooth


def training(path: pathlib.Path, runs: Mapping[str, Sequence[Run]]) -> None:
    """Plot training loss over tokens, averaged over about a fortieth of the run, with one line per seed."""

    def draw(axes: Any) -> None:
        for color, run, label in _lines_of(runs):
            there = np.flatnonzero(np.isfinite(run.losses))
            losses = smooth(run.losses[there], max(1, run.arm.num_steps // 40))
            steps = 1 + there
            axes.plot(run.tokens_at(steps) / 1e6, losses, color=color, lw=1, label=label)
        axes.set(xlabel="tokens (millions)", ylabel="training loss (nats per token)")
        axes.legend()

    _drawn(path, draw, size=(6.5, 3.6))


def instability(path: pathlib.Path, runs: Mapping[str, Sequence[Run]]) -> None:
    """Plot loss ratio, variance norm and variance maximum by step, with one line per seed."""
    panels = {
        "loss_ratio": "loss ratio",
        "variance_norm": "variance norm",
        "variance_max": "variance maximum",
    }

    def draw(axes: Any) -> None:
        for panel, (name, label_y) in zip(axes, panels.items(), strict=True):
            for color, run, label in _lines_of(runs):
                values = loss_ratio(run.losses) if name == "loss_ratio" else run.steps(name)
                steps = np.arange(1, len(values) + 1)
                panel.plot(steps, values, color=color, lw=0.7, alpha=0.8, label=label)
            panel.set(ylabel=label_y, xscale="log")
        threshold = runs["small"][0].threshold
        axes[0].axhline(threshold, color=COLORS[-1], ls=":", lw=1)
        axes[0].legend()
        axes[-1].set(xlabel="step")

    _drawn(path, draw, size=(6.5, 7.2), rows=3, sharex=True)


def validation(path: pathlib.Path, runs: Mapping[str, Sequence[Run]]) -> None:
    """Plot validation loss over tokens and over seconds of training steps, with one line per seed."""

    def draw(axes: Any) -> None:
        for color, run, label in _lines_of(runs):
            steps, losses = run.evaluations()
            style = {"color": color, "marker": ".", "ms": 3, "lw": 1, "label": label}
            axes[0].plot(run.tokens_at(steps) / 1e6, losses, **style)
            axes[1].plot(run.seconds_at(steps), losses, **style)
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
        "val_loss": "final validation loss",
        "greatest_pooled_loss_ratio": "largest loss ratio, pooled",
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
                    label = kind.removesuffix("_x").replace("_", ", ")
                    panel.errorbar(
                        x, y, spread, color=color, marker="o", ms=4, lw=1, capsize=3, label=label
                    )
            panel.axhline(named[f"small_{name}"], color=COLORS[0], ls=":", lw=1, label="small")
            panel.set_xscale("log", base=2)
            panel.set(xlabel="learning rate, multiple", ylabel=label_y)
            panel.xaxis.set_major_formatter("{x:g}")
        axes[0].legend()

    _drawn(path, draw, size=(9.5, 3.3), columns=3)


def _lines_of(runs: Mapping[str, Sequence[Run]]) -> Iterator[tuple[str, Run, str | None]]:
    """Yield each run with its arm's color, and a label for the first run of an arm."""
    for color, (arm, seeds) in zip(COLORS, runs.items(), strict=False):
        for seed, run in enumerate(seeds):
            yield color, run, arm.replace("_", " ") if seed == 0 else None


def _drawn(
    path: pathlib.Path,
    draw: Callable[[Any], None],
    *,
    size: tuple[float, float],
    rows: int = 1,
    columns: int = 1,
    **options: Any,
) -> None:
    from PIL import Image  # a dependency of matplotlib

    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=size, dpi=100, **options)
        draw(axes)
        figure.tight_layout()
        figure.savefig(path)
        plt.close(figure)
    with Image.open(path) as image:  # 64 colors are enough, and take half the bytes
        image.quantize(64).save(path, optimize=True)
