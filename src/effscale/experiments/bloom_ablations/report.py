"""Results: the loss of each arm at the training length and at longer ones."""

import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from effscale.experiments.bloom_ablations.config import ArmName, Config
from effscale.study.search import Found
from effscale.study.table import deviation
from effscale.training.plotting import COLORS, STYLE, band, pyplot

NAMES: dict[ArmName, str] = {
    "alibi": "ALiBi (BLOOM)",
    "rotary": "rotary positions",
    "learned": "learned positions",
    "alibi_without_norm": "ALiBi, no embedding norm",
}
"""The name of each arm in tables and figures."""

Losses = Mapping[ArmName, np.ndarray]
"""The losses of each arm, by seed and length."""


def read(folder: pathlib.Path, config: Config) -> Losses:
    """Read the losses of all runs; NaN if a run diverged."""

    def losses(arm: ArmName, seed: int) -> list[float]:
        file = folder / arm / f"seed-{seed}" / "final.json"
        found = json.loads(file.read_text(encoding="utf-8"))["losses"]
        return [np.nan if loss is None else loss for loss in found]

    return {
        arm: np.array([losses(arm, seed) for seed in range(config.seeds)]) for arm in config.arms
    }


def figures(losses: Losses, config: Config) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return the named figures, as means over seeds and for each seed. Lengths at which a run diverged are left out."""
    each = {
        f"{arm}_val_loss" + ("" if times == 1 else f"_{times}_times_longer"): found[:, i].tolist()
        for arm, found in losses.items()
        for i, times in enumerate(config.times_longer)
        if np.isfinite(found[:, i]).all()
    }
    return {name: float(np.mean(values)) for name, values in each.items()}, each


def tables(
    losses: Losses, config: Config, found: Mapping[ArmName, Found]
) -> dict[str, Sequence[Sequence[str]]]:
    """Return the tables for the terminal and the page."""
    lengths = [f"{config.length * times} tokens" for times in config.times_longer]
    rows = [["arm", *lengths]]
    for arm, values in losses.items():
        shown = (f"{column.mean():.3f} ± {deviation(column):.3f}" for column in values.T)
        rows.append([NAMES[arm], *shown])
    searched = [["arm", "learning rate", "warmup steps", "runs", "all neighbors tried"]]
    for arm, one in found.items():
        rate, warmup = one.best
        searched.append(
            [
                NAMES[arm],
                f"{rate:g}",
                str(warmup),
                str(len(one.losses)),
                "yes" if one.settled else "no",
            ]
        )
    return {
        "Loss on held-out text by sequence length, in nats per token": rows,
        "Result of the search for each arm": searched,
    }


def draw(path: pathlib.Path, losses: Losses, config: Config) -> None:
    """Draw the loss by sequence length: mean and range over seeds."""
    plt = pyplot()
    lengths = [config.length * times for times in config.times_longer]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.0, 3.6))
        for color, (arm, values) in zip(COLORS, losses.items(), strict=False):
            style = {"color": color, "marker": "o", "markersize": 4}
            band(axes, np.array(lengths), values, label=NAMES[arm], **style)
        axes.axvline(config.length, color="gray", linewidth=1, linestyle="--")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set(
            xlabel=f"sequence length in evaluation (dashed: in training, {config.length})",
            ylabel="loss (nats per token)",
        )
        axes.legend(ncol=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        figure.tight_layout()
        figure.savefig(path)
        plt.close(figure)
