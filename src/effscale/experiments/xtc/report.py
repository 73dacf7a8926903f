"""Results of the experiment ``xtc``: accuracies over seeds, and sizes."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from effscale.experiments.xtc.runs import UNTRAINED
from effscale.study.table import deviation
from effscale.training.plotting import COLORS, STYLE, pyplot

MEGABYTE = 1e6


def title(arm: str) -> str:
    """Return an arm's name in tables and figures.

    Example:
        >>> title("teacher"), title("ternary_3_layers")
        ('teacher', '3 layers, ternary')
    """
    kind, _, layers = arm.partition("_")
    return f"{layers.replace('_', ' ')}, {kind}" if layers else arm


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmResults:
    """Results of an arm.

    Attributes:
        searched: Best dev accuracy of seed 0, by budget and learning rate.
        rates: The chosen learning rate, by budget.
        measured: Results of `measure_model` for each seed, by budget.
    """

    searched: Mapping[int, Mapping[float, float]]
    rates: Mapping[int, float]
    measured: Sequence[Mapping[int, Mapping[str, float]]]

    @property
    def budgets(self) -> list[int]:
        """The budgets in ascending order; first `UNTRAINED`, if it was measured."""
        return sorted(self.measured[0])

    def values(self, name: str, steps: int | None = None) -> np.ndarray:
        """Return a measured value for each seed, at the longest budget by default."""
        steps = self.budgets[-1] if steps is None else steps
        return np.array([seed[steps][name] for seed in self.measured])

    def size(self, name: str) -> float:
        """Return the size of the model in bytes, ``total_bytes`` or ``code_bytes``; it is the same for all seeds and budgets."""
        return float(self.values(name)[0])


def figures_of(arms: Mapping[str, ArmResults]) -> dict[str, float | int]:
    """Return the named figures: accuracies by budget, sizes, learning rates, and the effect of packing.

    Args:
        arms: Results by arm; must include ``teacher``.
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
    """Return the tables of the report by title."""
    return {
        "Test accuracy at the longest budget, in percent": _accuracy_rows(arms),
        "Size, compared with the float teacher": _size_rows(arms),
        "Test accuracy by number of training steps, in percent": _budget_rows(arms),
        "Best dev accuracy of seed 0 by learning rate, in percent": _rate_rows(arms),
    }


def _accuracy_rows(arms: Mapping[str, ArmResults]) -> list[list[str]]:
    seeds = len(next(iter(arms.values())).measured)
    rows = [["arm", *(f"seed {seed}" for seed in range(seeds)), "mean", "std"]]
    for name, arm in arms.items():
        percent = 100 * arm.values("test_accuracy")
        numbers = [*percent, percent.mean(), deviation(percent)]
        rows.append([title(name), *(f"{number:.1f}" for number in numbers)])
    return rows


def _size_rows(arms: Mapping[str, ArmResults]) -> list[list[str]]:
    original = arms["teacher"].size("total_bytes")
    rows = [["arm", "total, MB", "times smaller", "codes only, MB", "times smaller"]]
    for name, arm in arms.items():
        row = [title(name)]
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
        rows.append(
            [title(name), *(f"{each.mean():.1f} ± {deviation(each):.1f}" for each in percent)]
        )
    return rows


def _rate_rows(arms: Mapping[str, ArmResults]) -> list[list[str]]:
    rates = sorted({rate for arm in arms.values() for tried in arm.searched.values() for rate in tried})  # fmt: skip
    rows = [["arm", "steps", *(f"{rate:g}" for rate in rates)]]
    for name, arm in arms.items():
        for steps, tried in arm.searched.items():
            shown = [f"{100 * tried[rate]:.1f}" for rate in rates]
            rows.append([title(name), str(steps), *shown])
    return rows


def draw(
    folder: pathlib.Path, named: Mapping[str, Any], budgets: Mapping[str, Sequence[int]]
) -> None:
    """Draw accuracy against size and against budget.

    Args:
        folder: The folder to write ``size.png`` and ``budget.png`` to.
        named: The named figures; those of a committed ``results.json`` work as well.
        budgets: The measured budgets, by arm.
    """
    plt = pyplot()
    colors = dict(zip(budgets, (COLORS[-1], *COLORS), strict=False))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.0, 3.6), dpi=100)
        for name in budgets:
            mean, std = named[f"{name}_accuracy"], named[f"{name}_accuracy_std"]
            bars = {"yerr": 100 * std, "color": colors[name], "capsize": 3}
            size = named[f"{name}_mb"]
            axes.errorbar(size, 100 * mean, fmt="o", label=title(name), **bars)
            if codes := named.get(f"{name}_codes_mb"):
                axes.errorbar(codes, 100 * mean, fmt="o", mfc="white", **bars)
        _draw_guess(axes, named)
        axes.set(xscale="log", xlabel="size in MB (hollow: integer codes only)")
        axes.set(ylabel="test accuracy (%)", ylim=(0, None))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.legend(loc="center right")
        _save(figure, folder / "size.png")

        figure, axes = plt.subplots(figsize=(6.0, 3.6), dpi=100)
        places: Sequence[int] = ()
        for name, steps in budgets.items():
            if name == "teacher":
                level = 100 * named[f"{name}_accuracy"]
                axes.axhline(level, color=colors[name], ls="--", lw=1, label=title(name))
                continue
            places = steps
            labels = [f"{name}_{_word(s, '{}_steps')}_accuracy" for s in steps]
            axes.errorbar(
                range(len(places)),
                [100 * named[label] for label in labels],
                yerr=[100 * named[f"{label}_std"] for label in labels],
                marker="o",
                capsize=3,
                color=colors[name],
                label=title(name),
            )
        _draw_guess(axes, named)
        axes.set_xticks(range(len(places)), [_word(s, "{}") for s in places])
        axes.set(xlabel="training steps", ylabel="test accuracy (%)", ylim=(0, None))
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.15))
        _save(figure, folder / "budget.png")


def _draw_guess(axes: Any, named: Mapping[str, Any]) -> None:
    level = 100 * named["majority"]
    axes.axhline(level, color="grey", ls=":", lw=1, label="most frequent label")


def _word(steps: int, form: str) -> str:
    return "untrained" if steps == UNTRAINED else form.format(steps)


def _save(figure: Any, path: pathlib.Path) -> None:
    figure.tight_layout()
    figure.savefig(path)
    pyplot().close(figure)
