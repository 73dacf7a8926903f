"""Results of the experiment ``onebit``: losses and accuracies over seeds, and the amount of data sent."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from effscale.experiments.onebit.config import Config
from effscale.experiments.onebit.optimizers import TWINS, rounds
from effscale.study.results import deviation
from effscale.training import read_jsonl
from effscale.training.plotting import (
    COLORS,
    STYLE,
    Records,
    band,
    pyplot,
    series,
    shrink,
)

NAMES = {
    "adam": "Adam",
    "onebit_adam": "1-bit Adam",
    "zero_one_adam": "0/1 Adam",
    "naive": "naive 1-bit gradients",
    "lamb": "LAMB",
    "onebit_lamb": "1-bit LAMB",
    "scratch": "random weights",
}
"""The name of each optimizer in tables and figures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runs:
    """An optimizer's runs of a task, one per seed.

    Attributes:
        records: Metrics of each run; None for the model that was not pretrained.
        accuracies: Test accuracy of each run after fine-tuning.
        rounds: Number of steps that sent more than a few scalars.
    """

    records: Sequence[Records] | None
    accuracies: np.ndarray
    rounds: int = 0

    @property
    def losses(self) -> np.ndarray:
        """Loss on all held-out text after the last step, for each seed."""
        return np.array([series(records, "val_loss")[1][-1] for records in self.records or ()])

    @property
    def sent(self) -> np.ndarray:
        """Bytes that each worker has sent after each step; equal for all seeds."""
        return np.cumsum(series((self.records or [[]])[0], "sent_bytes")[1])


def read(folder: pathlib.Path, task: str, config: Config) -> dict[str, Runs]:
    """Read all runs of a task by optimizer, and ``scratch``.

    Args:
        folder: The run folder.
        task: ``gpt`` or ``bert``.
        config: Config of the experiment.
    """

    def metrics(name: str) -> list[Records]:
        places = [folder / task / f"seed-{seed}" / name for seed in range(config.seeds)]
        return [read_jsonl(place / "metrics.jsonl") for place in places]

    found = {}
    for name in (*config.optimizers, "scratch"):
        tuned = metrics(f"{name}/passages")
        accuracies = np.array([series(records, "test_accuracy")[1][-1] for records in tuned])
        if name == "scratch":
            found[name] = Runs(records=None, accuracies=accuracies)
        else:
            plan = getattr(config, task)
            found[name] = Runs(
                records=metrics(name),
                accuracies=accuracies,
                rounds=rounds(name, plan.stages, plan.steps),
            )
    return found


def figures(task: str, runs: Mapping[str, Runs]) -> dict[str, float | int]:
    """Return the named figures; differences from the uncompressed baseline are computed for each seed."""
    named: dict[str, float | int] = {}
    for name, found in runs.items():
        start = f"{task}_{name}"
        baseline = runs.get(TWINS.get(name, ""))  # type: ignore[call-overload]
        if found.records is not None:
            named |= _spread(f"{start}_val_loss", found.losses)
            if baseline is not None:
                named |= _spread(f"{start}_val_loss_difference", found.losses - baseline.losses)
            named[f"{start}_megabytes"] = float(found.sent[-1]) / 1e6
            named[f"{start}_rounds"] = found.rounds
            if baseline is not None:
                named[f"{start}_times_less_sent"] = float(baseline.sent[-1] / found.sent[-1])
        named |= _spread(f"{start}_accuracy", found.accuracies)
    return named


def _spread(name: str, values: np.ndarray) -> dict[str, float]:
    return {name: float(values.mean()), f"{name}_std": deviation(values)}


def _with_deviation(differences: np.ndarray) -> str:
    return f"{differences.mean():+.3f} ± {deviation(differences):.3f}"


def tables(task: str, runs: Mapping[str, Runs]) -> list[tuple[str, list[list[str]]]]:
    """Return two tables with their titles: losses and data sent, and accuracies."""
    pretrained = {name: found for name, found in runs.items() if found.records is not None}
    seeds = len(next(iter(runs.values())).accuracies)
    each = [f"seed {seed}" for seed in range(seeds)]
    losses = [["optimizer", *each, "mean", "std", "minus baseline", "MB sent", "rounds"]]
    for name, found in pretrained.items():
        values = found.losses
        numbers = [f"{value:.3f}" for value in (*values, values.mean(), deviation(values))]
        baseline = runs.get(TWINS.get(name, ""))  # type: ignore[call-overload]
        over = "" if baseline is None else _with_deviation(values - baseline.losses)
        megabytes = f"{found.sent[-1] / 1e6:,.1f}"
        losses.append([NAMES[name], *numbers, over, megabytes, f"{found.rounds:,}"])
    accuracies = [["pretrained with", *each, "mean", "std"]]
    for name, found in runs.items():
        values = 100 * found.accuracies
        numbers = [f"{value:.1f}" for value in (*values, values.mean(), deviation(values))]
        accuracies.append([NAMES[name], *numbers])
    return [
        (f"{task.upper()}: validation loss in nats per token, and what each worker sent", losses),
        (f"{task.upper()}: test accuracy after fine-tuning, in percent", accuracies),
    ]


def draw(path: pathlib.Path, runs: Mapping[Any, Mapping[str, Runs]], *, majority: float) -> None:
    """Draw one row per task: loss, difference from the baseline, loss over data sent, and accuracies.

    Curves are the mean and range over seeds; accuracies have one dot per seed.

    Args:
        path: The PNG to write.
        runs: Runs by task and optimizer.
        majority: Accuracy of a constant answer.
    """
    plt = pyplot()
    with plt.rc_context(STYLE):
        size = (14.0, 3.3 * len(runs) + 0.5)
        figure, axes = plt.subplots(len(runs), 4, figsize=size, dpi=80, squeeze=False)
        for row, (task, found) in zip(axes, runs.items(), strict=True):
            colors = dict(zip(found, COLORS, strict=False))
            pretrained = {name: arm for name, arm in found.items() if arm.records is not None}
            curves: dict[str, np.ndarray] = {}
            steps = np.array([])
            for name, arm in pretrained.items():
                steps = series((arm.records or [[]])[0], "part_val_loss")[0]
                curves[name] = np.array([series(r, "part_val_loss")[1] for r in arm.records or ()])
                style = {"color": colors[name], "marker": ".", "lw": 1.3}
                band(row[0], steps, curves[name], label=NAMES[name], **style)
                sent, losses = float(arm.sent[-1]) / 1e6, arm.losses
                bar = [[losses.mean() - losses.min()], [losses.max() - losses.mean()]]
                row[2].errorbar(sent, losses.mean(), bar, fmt="o", color=colors[name], capsize=3)
            _draw_differences(row[1], steps, curves, colors)
            row[0].set(xlabel="step", ylabel=f"{task.upper()}: loss on part of\nthe held-out text")
            row[1].set(xlabel="step", ylabel="loss minus that of the baseline")
            row[2].set(xscale="log", xlabel="MB sent by each worker", ylabel="final loss")
            for place, (name, arm) in enumerate(found.items()):
                values = 100 * arm.accuracies
                row[3].plot(np.full(len(values), place), values, "o", color=colors[name], alpha=0.6)
                row[3].hlines(values.mean(), place - 0.3, place + 0.3, color=colors[name])
            row[3].axhline(100 * majority, color="gray", ls=":", lw=1)
            names = [NAMES[name] for name in found]
            row[3].set_xticks(range(len(found)), names, rotation=35, ha="right", fontsize=8)
            row[3].set_ylabel("accuracy after fine-tuning (%)")
        handles = axes[0][0].get_legend_handles_labels()
        figure.legend(*handles, loc="upper center", ncols=len(handles[1]), fontsize=9)
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.4 / size[1]))
        figure.savefig(path)
        plt.close(figure)
    shrink(path)


def _draw_differences(
    axes: Any, steps: np.ndarray, curves: Mapping[str, np.ndarray], colors: Mapping[str, str]
) -> None:
    """Draw each compressed optimizer's loss minus that of its baseline. The axis limits ignore compressed gradients, which fail."""
    limit = 0.0
    for name, values in curves.items():
        baseline = curves.get(TWINS.get(name, ""))  # type: ignore[call-overload]
        if baseline is None:
            continue
        differences = values - baseline
        band(axes, steps, differences, color=colors[name], marker=".", lw=1.3)
        if name != "naive":
            limit = max(limit, float(np.abs(differences).max()))
    axes.axhline(0, color="black", ls=":", lw=1)
    if limit > 0:
        axes.set_ylim(-1.1 * limit, 1.1 * limit)
