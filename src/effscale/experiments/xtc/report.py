"""What the runs of the experiment ``xtc`` showed: accuracies over seeds, sizes, tables, figures."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from effscale.experiments.shared.plotting import COLORS, STYLE, pyplot
from effscale.experiments.shared.results import deviation
from effscale.experiments.xtc.runs import UNTRAINED

MEGABYTE = 1e6


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmResults:
    """What was measured of an arm.

    Attributes:
        searched: For each budget and rate the best dev accuracy of seed 0.
        rates: For each budget the rate that was taken.
        measured: For each seed, for each budget, what `measure_model` gives.
    """

    searched: Mapping[int, Mapping[float, float]]
    rates: Mapping[int, float]
    measured: Sequence[Mapping[int, Mapping[str, float]]]

    @property
    def budgets(self) -> list[int]:
        """The budgets, `UNTRAINED` first where it was measured."""
        return sorted(self.measured[0])

    def values(self, name: str, steps: int | None = None) -> np.ndarray:
        """A measured number of each seed, at the longest budget by default."""
        steps = self.budgets[-1] if steps is None else steps
        return np.array([seed[steps][name] for seed in self.measured])

    def size(self, name: str) -> float:
        """Bytes of the model, ``total_bytes`` or ``code_bytes``; all seeds and budgets have the same."""
        return float(self.values(name)[0])


def figures_of(arms: Mapping[str, ArmResults]) -> dict[str, float | int]:
    """The named figures: accuracies at the longest budget and at each, sizes, learning rates, and what packing changes.

    Args:
        arms: By name; ``teacher`` must be there.
    """
    named: dict[str, float | int] = {}
    original = arms["teacher"].size("total_bytes")
    for name, arm in arms.items():
        accuracies = arm.values("test_accuracy")
        total, codes = arm.size("total_bytes"), arm.size("code_bytes")
        named[f"{name}_accuracy"] = float(accuracies.mean())
        named[f"{name}_accuracy_std"] = deviation(accuracies)
        named[f"{name}_mb"] = total / MEGABYTE
        named[f"{name}_times_smaller"] = original / total
        if codes:
            named[f"{name}_codes_mb"] = codes / MEGABYTE
            named[f"{name}_codes_times_smaller"] = original / codes
            trained = arm.values("trained_accuracy")
            named[f"{name}_trained_accuracy"] = float(trained.mean())
            named[f"{name}_agreement"] = float(arm.values("agreement").min())
            named[f"{name}_logit_difference"] = float(arm.values("logit_difference").max())
        for steps in arm.budgets:
            label = "untrained" if steps == UNTRAINED else f"{steps}_steps"
            at = arm.values("test_accuracy", steps)
            named[f"{name}_{label}_accuracy"] = float(at.mean())
            named[f"{name}_{label}_accuracy_std"] = deviation(at)
            if steps != UNTRAINED:
                named[f"{name}_{label}_rate"] = arm.rates[steps]
    return named


def tables_of(arms: Mapping[str, ArmResults]) -> dict[str, list[list[str]]]:
    """By title, the tables of the report."""
    return {
        "Test accuracy at the longest budget, in percent": _accuracy_rows(arms),
        "Size, against the float teacher": _size_rows(arms),
        "Test accuracy by steps of training, in percent": _budget_rows(arms),
        "Best accuracy of seed 0 on the dev passages by learning rate, in percent": _rate_rows(
            arms
        ),
    }


def _accuracy_rows(arms: Mapping[str, ArmResults]) -> list[list[str]]:
    seeds = len(next(iter(arms.values())).measured)
    rows = [["arm", *(f"seed {seed}" for seed in range(seeds)), "mean", "deviation"]]
    for name, arm in arms.items():
        percent = 100 * arm.values("test_accuracy")
        numbers = [*percent, percent.mean(), deviation(percent)]
        rows.append([name, *(f"{number:.1f}" for number in numbers)])
    return rows


def _size_rows(arms: Mapping[str, ArmResults]) -> list[list[str]]:
    original = arms["teacher"].size("total_bytes")
    rows = [["arm", "MB in all", "times smaller", "MB of codes", "times smaller"]]
    for name, arm in arms.items():
        row = [name]
        for size in (arm.size("total_bytes"), arm.size("code_bytes")):
            row += [f"{size / MEGABYTE:.2f}", f"{original / size:.1f}"] if size else ["", ""]
        rows.append(row)
    return rows


def _budget_rows(arms: Mapping[str, ArmResults]) -> list[list[str]]:
    students = {name: arm for name, arm in arms.items() if name != "teacher"}
    budgets = next(iter(students.values())).budgets
    rows = [["arm", *("untrained" if steps == UNTRAINED else str(steps) for steps in budgets)]]
    for name, arm in students.items():
        percent = [100 * arm.values("test_accuracy", steps) for steps in budgets]
        rows.append([name, *(f"{each.mean():.1f} ± {deviation(each):.1f}" for each in percent)])
    return rows


def _rate_rows(arms: Mapping[str, ArmResults]) -> list[list[str]]:
    rates = sorted({rate for arm in arms.values() for tried in arm.searched.values() for rate in tried})  # fmt: skip
    rows = [["arm", "steps", *(f"{rate:g}" for rate in rates)]]
    for name, arm in arms.items():
        for steps, tried in arm.searched.items():
            shown = [f"{100 * tried[rate]:.1f}" for rate in rates]
            rows.append([name, str(steps), *shown])
    return rows


def draw(folder: pathlib.Path, arms: Mapping[str, ArmResults], majority: float) -> None:
    """Draws accuracy against size and against budget.

    Args:
        folder: Where ``size.png`` and ``budget.png`` are written.
        arms: By name.
        majority: Accuracy of the most frequent label.
    """
    plt = pyplot()
    colors = dict(zip(arms, (COLORS[-1], *COLORS), strict=False))
    words = {name: name.replace("_", " ") for name in arms}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.0, 3.6), dpi=100)
        for name, arm in arms.items():
            accuracies, total = arm.values("test_accuracy"), arm.size("total_bytes")
            bars = {"yerr": deviation(accuracies), "color": colors[name], "capsize": 3}
            mean = accuracies.mean()
            axes.errorbar(total / MEGABYTE, mean, fmt="o", label=words[name], **bars)
            if codes := arm.size("code_bytes"):
                axes.errorbar(codes / MEGABYTE, mean, fmt="o", mfc="white", **bars)
        axes.axhline(majority, color="grey", ls=":", lw=1)
        axes.set(xscale="log", xlabel="MB in all (hollow: codes alone)", ylabel="test accuracy")
        axes.legend()
        _save(figure, folder / "size.png")

        figure, axes = plt.subplots(figsize=(6.0, 3.6), dpi=100)
        places: Any = None
        for name, arm in arms.items():
            if name == "teacher":
                level = arm.values("test_accuracy").mean()
                axes.axhline(level, color=colors[name], ls="--", lw=1, label=words[name])
                continue
            places = arm.budgets
            values = [arm.values("test_accuracy", steps) for steps in places]
            axes.errorbar(
                range(len(places)),
                [each.mean() for each in values],
                yerr=[deviation(each) for each in values],
                marker="o",
                capsize=3,
                color=colors[name],
                label=words[name],
            )
        axes.axhline(majority, color="grey", ls=":", lw=1)
        axes.set_xticks(
            range(len(places)), ["untrained" if s == UNTRAINED else str(s) for s in places]
        )
        axes.set(xlabel="steps of training", ylabel="test accuracy")
        axes.legend()
        _save(figure, folder / "budget.png")


def _save(figure: Any, path: pathlib.Path) -> None:
    figure.tight_layout()
    figure.savefig(path)
    pyplot().close(figure)
