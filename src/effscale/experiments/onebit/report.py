"""What the runs of the experiment ``onebit`` showed: losses and accuracies over seeds, what was sent, tables, a figure."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from effscale.experiments.onebit.config import Config
from effscale.experiments.onebit.optimizers import TWINS, rounds
from effscale.experiments.shared.plotting import COLORS, STYLE, Records, pyplot, series
from effscale.experiments.shared.results import deviation
from effscale.training import read_jsonl


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runs:
    """An optimizer's runs of a task, one per seed.

    Attributes:
        records: Each one's metrics; None for the model that was not pretrained.
        accuracies: Each one's test accuracy after fine-tuning.
        rounds: Steps in which more than a few single numbers were sent.
    """

    records: Sequence[Records] | None
    accuracies: np.ndarray
    rounds: int = 0

    @property
    def losses(self) -> np.ndarray:
        """Each seed's loss on all that is held out, after the last step."""
        return np.array([series(records, "val_loss")[1][-1] for records in self.records or ()])

    @property
    def sent(self) -> np.ndarray:
        """Bytes that each worker has sent after each step; equal for all seeds."""
        return np.cumsum(series((self.records or [[]])[0], "sent_bytes")[1])


def read(folder: pathlib.Path, task: str, config: Config) -> dict[str, Runs]:
    """All runs of a task by optimizer, and ``scratch``.

    Args:
        folder: The run folder.
        task: ``gpt`` or ``bert``.
        config: What the experiment was told.
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
    """The named figures; differences are seed by seed from the uncompressed twin."""
    named: dict[str, float | int] = {}
    for name, found in runs.items():
        start = f"{task}_{name}"
        twin = runs.get(TWINS.get(name, ""))  # type: ignore[call-overload]
        if found.records is not None:
            named |= _spread(f"{start}_val_loss", found.losses)
            if twin is not None:
                named |= _spread(f"{start}_val_loss_difference", found.losses - twin.losses)
            named[f"{start}_megabytes"] = float(found.sent[-1]) / 1e6
            named[f"{start}_rounds"] = found.rounds
            if twin is not None:
                named[f"{start}_times_less_sent"] = float(twin.sent[-1] / found.sent[-1])
        named |= _spread(f"{start}_accuracy", found.accuracies)
    return named


def _spread(name: str, values: np.ndarray) -> dict[str, float]:
    return {name: float(values.mean()), f"{name}_std": deviation(values)}


def _with_deviation(differences: np.ndarray) -> str:
    return f"{differences.mean():+.3f} ± {deviation(differences):.3f}"


def tables(task: str, runs: Mapping[str, Runs]) -> list[tuple[str, list[list[str]]]]:
    """Losses and what was sent, and accuracies; each with its title."""
    pretrained = {name: found for name, found in runs.items() if found.records is not None}
    seeds = len(next(iter(runs.values())).accuracies)
    each = [f"seed {seed}" for seed in range(seeds)]
    losses = [["optimizer", *each, "mean", "deviation", "over its twin", "MB sent", "rounds"]]
    for name, found in pretrained.items():
        values = found.losses
        numbers = [f"{value:.3f}" for value in (*values, values.mean(), deviation(values))]
        twin = runs.get(TWINS.get(name, ""))  # type: ignore[call-overload]
        over = "" if twin is None else _with_deviation(values - twin.losses)
        megabytes = f"{found.sent[-1] / 1e6:,.1f}"
        losses.append([name, *numbers, over, megabytes, f"{found.rounds:,}"])
    accuracies = [["pretrained by", *each, "mean", "deviation"]]
    for name, found in runs.items():
        values = 100 * found.accuracies
        numbers = [f"{value:.1f}" for value in (*values, values.mean(), deviation(values))]
        accuracies.append([name, *numbers])
    return [
        (f"{task}: validation loss in nats a token, and what a worker sent", losses),
        (f"{task}: test accuracy after fine-tuning, in percent", accuracies),
    ]


def draw(path: pathlib.Path, runs: Mapping[Any, Mapping[str, Runs]], *, majority: float) -> None:
    """A row a task: its loss over steps and over what was sent, each seed a line, and accuracies, each seed a dot.

    Args:
        path: The PNG to write.
        runs: By task and optimizer.
        majority: Accuracy of a constant answer.
    """
    from PIL import Image  # matplotlib's own dependency

    plt = pyplot()
    with plt.rc_context(STYLE):
        size = (11.0, 3.2 * len(runs) + 0.5)
        figure, axes = plt.subplots(len(runs), 3, figsize=size, dpi=90, squeeze=False)
        for row, (task, found) in zip(axes, runs.items(), strict=True):
            colors = dict(zip(found, COLORS, strict=False))
            for name, arm in found.items():
                for seed, records in enumerate(arm.records or ()):
                    steps, losses = series(records, "part_val_loss")
                    label = name if seed == 0 else None
                    style = {"color": colors[name], "lw": 1.0, "marker": ".", "label": label}
                    row[0].plot(steps, losses, **style)
                    row[1].semilogx(arm.sent[steps.astype(int) - 1] / 1e6, losses, **style)
            row[0].set(xlabel="step", ylabel=f"{task}: loss on a part of\nthe held-out text")
            row[1].set(xlabel="MB sent by a worker")
            for place, (name, arm) in enumerate(found.items()):
                values = 100 * arm.accuracies
                row[2].plot(np.full(len(values), place), values, "o", color=colors[name], alpha=0.6)
                row[2].hlines(values.mean(), place - 0.3, place + 0.3, color=colors[name])
            row[2].axhline(100 * majority, color="gray", ls=":", lw=1)
            row[2].set_xticks(range(len(found)), list(found), rotation=35, ha="right", fontsize=8)
            row[2].set_ylabel("accuracy after fine-tuning (%)")
        handles = axes[0][0].get_legend_handles_labels()
        figure.legend(*handles, loc="upper center", ncols=len(handles[1]), fontsize=9)
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.4 / size[1]))
        figure.savefig(path)
        plt.close(figure)
    with Image.open(path) as image:  # 64 colours are enough, and half the bytes
        image.quantize(64).save(path, optimize=True)
