"""Results of the experiment ``finetune``: accuracies over seeds."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

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

BACKENDS = ("effscale", "torch")
NAMES = {"effscale": "effscale", "torch": "PyTorch"}
"""The name of each backend in tables and figures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A task's runs, one per backend and seed.

    Attributes:
        records: Metrics of each seed, by backend.
        test_size: Number of test examples.
        majority: Accuracy of the most frequent label.
        per_epoch: Number of steps per epoch.
    """

    records: Mapping[str, Sequence[Records]]
    test_size: int
    majority: float
    per_epoch: int

    def accuracies(self, backend: str) -> np.ndarray:
        """Return the last test accuracy of each seed."""
        return np.array([series(r, "test_accuracy")[1][-1] for r in self.records[backend]])

    def loss_gaps(self) -> np.ndarray:
        """Return ``|loss - torch's loss|`` for each seed and training step."""
        ours, theirs = (
            np.array([series(r, "loss")[1] for r in self.records[backend]]) for backend in BACKENDS
        )
        return np.abs(ours - theirs)

    def figures(self) -> dict[str, float]:
        """Return the named figures."""
        named: dict[str, float] = {"majority": self.majority, "test_size": self.test_size}
        for backend in self.records:
            values = self.accuracies(backend)
            prefix = "" if backend == "effscale" else "torch_"
            named[f"{prefix}accuracy"] = float(values.mean())
            named[f"{prefix}accuracy_std"] = deviation(values)
        if "torch" in self.records:
            difference = self.accuracies("effscale") - self.accuracies("torch")
            named["accuracy_difference"] = float(difference.mean())
            named["accuracy_difference_std"] = deviation(difference)
            gaps = self.loss_gaps()
            named["loss_gap_first_step"] = float(gaps[:, 0].max())
            named["loss_gap_first_epoch"] = float(np.median(gaps[:, : self.per_epoch]))
        return named


def read_comparison(
    folder: pathlib.Path,
    backends: Sequence[str],
    seeds: int,
    *,
    test_size: int,
    majority: float,
    per_epoch: int,
) -> Comparison:
    """Read the comparison from the metrics under ``folder/seed-<n>/<backend>``."""
    read = lambda backend, seed: read_jsonl(folder / f"seed-{seed}" / backend / "metrics.jsonl")
    return Comparison(
        records={b: [read(b, seed) for seed in range(seeds)] for b in backends},
        test_size=test_size,
        majority=majority,
        per_epoch=per_epoch,
    )


def accuracy_rows(comparisons: Mapping[str, Comparison]) -> list[list[str]]:
    """Return a heading and one row per task and backend: the accuracy of each seed in percent, mean and standard deviation."""
    seeds = max(len(runs) for c in comparisons.values() for runs in c.records.values())
    rows = [["task", "library", *(f"seed {seed}" for seed in range(seeds)), "mean", "std"]]
    for task, comparison in comparisons.items():
        for backend in comparison.records:
            percent = 100 * comparison.accuracies(backend)
            numbers = [*percent, percent.mean(), deviation(percent)]
            rows.append([task, NAMES[backend], *(f"{number:.1f}" for number in numbers)])
    return rows


def draw(path: pathlib.Path, comparisons: Mapping[str, Comparison]) -> None:
    """Draw test accuracy over epochs and, if PyTorch ran too, the absolute difference of the losses below. Lines are means and
    bands are ranges over seeds.

    Args:
        path: The PNG to write.
        comparisons: Comparisons by task.
    """
    from matplotlib.ticker import MaxNLocator

    plt = pyplot()
    both = any("torch" in c.records for c in comparisons.values())
    rows, columns = 2 if both else 1, len(comparisons)
    with plt.rc_context(STYLE):
        size = (3.4 * columns + 0.4, 2.7 * rows + 0.3)
        figure, axes = plt.subplots(rows, columns, figsize=size, dpi=100, squeeze=False)
        for column, (task, comparison) in enumerate(comparisons.items()):
            top = axes[0][column]
            for color, style, backend in zip(COLORS, ("-", "--"), BACKENDS, strict=False):
                runs = [series(r, "test_accuracy") for r in comparison.records.get(backend, ())]
                if runs:
                    epochs, curves = (
                        runs[0][0] / comparison.per_epoch,
                        [values for _, values in runs],
                    )
                    look = {"color": color, "ls": style, "marker": ".", "lw": 1.3}
                    band(top, epochs, curves, label=NAMES[backend], **look)
            top.axhline(
                comparison.majority, color=COLORS[-1], ls=":", lw=1, label="most frequent label"
            )
            top.set(title=f"{task} ({comparison.test_size} test examples)", xlabel="epoch")
            top.xaxis.set_major_locator(MaxNLocator(integer=True))
            if column == 0:
                top.set_ylabel("test accuracy")
                top.legend()
            if both:
                bottom = axes[1][column]
                gaps = comparison.loss_gaps()
                epochs = (1 + np.arange(gaps.shape[1])) / comparison.per_epoch
                # A logarithmic axis cannot show a difference of 0.
                band(bottom, epochs, np.maximum(gaps, 1e-8), color=COLORS[2], lw=1.0)
                bottom.set(xlabel="epoch", yscale="log", ylim=(1e-8, 10))
                if column == 0:
                    bottom.set_ylabel("difference of the training losses\n(nats, absolute)")
        figure.tight_layout()
        figure.savefig(path)
        plt.close(figure)
    shrink(path)
