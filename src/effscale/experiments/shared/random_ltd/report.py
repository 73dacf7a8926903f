"""Results of runs with and without random-LTD: quality over seeds, and cost."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from effscale.experiments.shared.random_ltd.arms import ARMS, Arm
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

NAMES = {"baseline": "baseline", "random_ltd": "random-LTD", "scratch": "random weights"}
"""The name of each arm in tables and figures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmRuns:
    """An arm's runs, one per seed.

    Attributes:
        arm: The arm, with its theoretical cost.
        records: Metrics of each run.
        timing: Speed records of each run.
    """

    arm: Arm
    records: Sequence[Records]
    timing: Sequence[Records]

    @classmethod
    def read(cls, folders: Sequence[pathlib.Path], arm: Arm) -> "ArmRuns":
        """Read the runs in ``folders``."""
        return cls(
            arm=arm,
            records=[read_jsonl(folder / "metrics.jsonl") for folder in folders],
            timing=[
                read_jsonl(file) if (file := folder / "timing.jsonl").is_file() else []
                for folder in folders
            ],
        )

    def last(self, name: str) -> np.ndarray:
        """Return the last value of a metric for each seed."""
        return np.array([series(records, name)[1][-1] for records in self.records])

    def step_seconds(self) -> dict[int, float]:
        """Return the seconds of a step by kept tokens: the median over all seeds' steps.

        Compilations are not included: the first step is not timed, and the second waits until all are finished. For a number of
        kept tokens without timed steps, the value is interpolated between its neighbors.
        """
        times: dict[int, list[float]] = {kept: [] for kept in self.arm.stages.values}
        for timing in self.timing:
            for record in timing:
                kept = self.arm.stages(record["step"] - 1)
                speed = record["tokens_per_second"]
                times[kept].append(self.arm.layer_tokens(kept) / speed)
        known = {kept: float(np.median(values)) for kept, values in times.items() if values}
        if not known:
            return dict.fromkeys(times, 0.0)
        between = lambda kept: float(np.interp(kept, [*known], [*known.values()]))
        return {kept: known.get(kept, between(kept)) for kept in times}

    def seconds_at(self, steps: np.ndarray) -> np.ndarray:
        """Return the seconds of the first ``steps`` steps, from ``step_seconds``."""
        each = self.step_seconds()
        kept = [self.arm.stages(step) for step in range(self.arm.num_steps)]
        sums = np.concatenate([[0.0], np.cumsum([each[k] for k in kept])])
        return sums[steps.astype(int)]

    def layer_tokens_at(self, steps: np.ndarray) -> np.ndarray:
        """Return the layer tokens of the first ``steps`` steps."""
        total = self.arm.stages.total
        return np.array([total(int(step), self.arm.layer_tokens) for step in steps])

    @property
    def seconds(self) -> float:
        """Seconds of a run's training steps."""
        return float(self.seconds_at(np.array([self.arm.num_steps]))[0])


def last_values(folders: Sequence[pathlib.Path], metric: str) -> np.ndarray:
    """Return the last value of a metric in each folder's ``metrics.jsonl``."""
    return np.array(
        [series(read_jsonl(folder / "metrics.jsonl"), metric)[1][-1] for folder in folders]
    )


def quality_figures(values: Mapping[str, np.ndarray], name: str) -> dict[str, float]:
    """Return each arm's mean and standard deviation over seeds, and the seed-by-seed difference of random-LTD from the baseline.

    Args:
        values: The value of each seed, by arm; must include ``baseline`` and ``random_ltd``.
        name: Name of the figure in ``results.json``.

    Example:
        >>> values = {"baseline": np.array([1.0, 2.0]), "random_ltd": np.array([1.5, 2.5])}
        >>> figures = quality_figures(values, "loss")
        >>> figures["baseline_loss"], figures["loss_difference"], figures["loss_difference_std"]
        (1.5, 0.5, 0.0)
    """
    named = {}
    for arm, each in values.items():
        named[f"{arm}_{name}"] = float(each.mean())
        named[f"{arm}_{name}_std"] = deviation(each)
    difference = values["random_ltd"] - values["baseline"]
    named[f"{name}_difference"] = float(difference.mean())
    named[f"{name}_difference_std"] = deviation(difference)
    return named


def cost_figures(runs: Mapping[str, ArmRuns]) -> dict[str, float | int]:
    """Return layer tokens, operations and seconds of a run of each arm, and the shares that random-LTD saves."""
    named: dict[str, float | int] = {}
    for arm in ARMS:
        named[f"{arm}_layer_tokens"] = runs[arm].arm.total_layer_tokens
        named[f"{arm}_teraflops"] = runs[arm].arm.total_flops / 1e12
        named[f"{arm}_step_seconds"] = runs[arm].seconds
    for name in ("layer_tokens", "teraflops", "step_seconds"):
        before, after = (named[f"{arm}_{name}"] for arm in ARMS)
        named[f"{name}_saved"] = 1 - after / before if before else 0.0
    return named


def cost_rows(figures: Mapping[str, float | int]) -> list[list[str]]:
    """Return a heading and one row per cost: the value of each arm, and the share that random-LTD saves."""
    rows = [["cost of a run", *(NAMES[arm] for arm in ARMS), "saved"]]
    for title, name, scale in (
        ("thousand layer tokens", "layer_tokens", 1e-3),
        ("TFLOP (theoretical)", "teraflops", 1.0),
        ("seconds of training steps", "step_seconds", 1.0),
    ):
        values = [f"{scale * figures[f'{arm}_{name}']:,.1f}" for arm in ARMS]
        rows.append([title, *values, f"{100 * figures[f'{name}_saved']:.1f} %"])
    return rows


def quality_rows(values: Mapping[str, np.ndarray], *, decimals: int) -> list[list[str]]:
    """Return a heading and one row per arm: the value of each seed, mean and standard deviation."""
    seeds = len(next(iter(values.values())))
    rows = [["arm", *(f"seed {seed}" for seed in range(seeds)), "mean", "std"]]
    for arm, each in values.items():
        numbers = [*each, each.mean(), deviation(each)]
        rows.append([NAMES[arm], *(f"{number:.{decimals}f}" for number in numbers)])
    return rows


def draw(
    path: pathlib.Path,
    runs: Mapping[str, ArmRuns],
    metric: str,
    *,
    label: str,
    level: tuple[str, float] | None = None,
    after: tuple[str, Mapping[str, np.ndarray]] | None = None,
) -> None:
    """Draw a metric over layer tokens and over seconds, as mean and range over seeds.

    Args:
        path: The PNG to write.
        runs: Runs by arm.
        metric: Name of the metric in ``metrics.jsonl``.
        label: Axis label of the metric.
        level: Name and value of a horizontal line to compare with.
        after: Label and values of an optional third panel, with one dot per seed; the values of each seed by name.
    """
    plt = pyplot()
    columns = 2 if after is None else 3
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, columns, figsize=(3.6 * columns, 3.3), dpi=100)
        for color, arm in zip(COLORS, ARMS, strict=False):
            seeds = [series(records, metric) for records in runs[arm].records]
            steps, curves = seeds[0][0], [values for _, values in seeds]
            for axis, costs in (
                (axes[0], runs[arm].layer_tokens_at(steps) / 1e3),
                (axes[1], runs[arm].seconds_at(steps)),
            ):
                band(axis, costs, curves, color=color, label=NAMES[arm], marker=".", lw=1.3)
        axes[0].set(xlabel="layer tokens (thousands)", ylabel=label)
        axes[1].set(xlabel="seconds of training steps")
        for axis in axes[:2]:
            axis.set_xlim(left=0)
            if level is not None:
                axis.axhline(level[1], color=COLORS[-1], ls=":", lw=1, label=level[0])
        figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncols=3)
        if after is not None:
            for place, (name, values) in enumerate(after[1].items()):
                color = COLORS[ARMS.index(name)] if name in ARMS else COLORS[3]
                axes[2].plot(np.full(len(values), place), values, "o", color=color, alpha=0.6)
                axes[2].hlines(np.mean(values), place - 0.25, place + 0.25, color=color)
            names = [NAMES[name].replace(" ", "\n") for name in after[1]]
            axes[2].set_xticks(range(len(names)), names)
            axes[2].set(ylabel=after[0], xlim=(-0.6, len(names) - 0.4))
        figure.tight_layout(rect=(0, 0, 1, 0.93))  # the legend is above
        figure.savefig(path)
        plt.close(figure)
    shrink(path)
