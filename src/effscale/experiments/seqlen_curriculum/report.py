"""Results of the experiment ``seqlen_curriculum``: figures over seeds, and tables."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from effscale.curriculum.instability import loss_ratio, unstable_steps
from effscale.experiments.seqlen_curriculum.arms import Arm
from effscale.experiments.seqlen_curriculum.config import Config
from effscale.training import read_jsonl
from effscale.training.plotting import Records

SPREAD = (
    "val_loss",
    "unstable_steps",
    "greatest_loss_ratio",
    "greatest_pooled_loss_ratio",
    "variance_norm",
    "variance_max",
)
"""Figures that are reported with their standard deviation over seeds."""


def title(arm: str) -> str:
    """Return an arm's name in tables and figures.

    Example:
        >>> title("small"), title("large_x4"), title("large_curriculum_x16")
        ('small batch', 'large batch, 4 L', 'large batch, 16 L, short first')
    """
    kind, _, factor = arm.rpartition("_x")
    if not kind:
        return f"{arm} batch"
    return f"large batch, {factor} L" + (", short first" if kind.endswith("curriculum") else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run.

    Attributes:
        arm: The arm.
        records: The metrics.
        step_seconds: Seconds of a step by length, from all runs of the arm.
        warmup: Number of warmup steps.
        threshold: The loss ratio above which a step is unstable.
        window: Number of tokens in a large batch of whole rows.
    """

    arm: Arm
    records: Records
    step_seconds: Mapping[int, float]
    warmup: int
    threshold: float
    window: int

    @functools.cached_property
    def losses(self) -> np.ndarray:
        """The training loss of each step; NaN where it was not finite."""
        return self.steps("loss")

    @property
    def diverged(self) -> bool:
        """Whether the run ended before its last evaluation, because too many updates in a row were skipped."""
        return self.arm.num_steps not in self.evaluations()[0]

    def steps(self, name: str) -> np.ndarray:
        """Return a metric at each step; NaN where it was not finite."""
        values = [r[name] for r in self.records if name in r and "loss" in r]
        return np.array([np.nan if value is None else value for value in values], np.float64)

    def pooled_losses(self) -> np.ndarray:
        """Return the training loss averaged over windows of as many tokens as a large batch has; NaN where a loss was not finite.

        The loss of a small batch varies more, because it averages over fewer tokens. Pooling makes the arms comparable.
        """
        steps = np.arange(len(self.losses) + 1)
        tokens = self.tokens_at(steps)
        stretches = (tokens[:-1] // self.window).astype(int)
        each = np.diff(tokens)
        sums = np.bincount(stretches, self.losses * each)
        return sums / np.bincount(stretches, each)

    def evaluations(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps and losses of the evaluations; NaN where a loss was not finite."""
        found = [r for r in self.records if "val_loss" in r]
        losses = [np.nan if r["val_loss"] is None else r["val_loss"] for r in found]
        return np.array([r["step"] for r in found], np.float64), np.array(losses, np.float64)

    @property
    def last_loss(self) -> float:
        """The validation loss after all tokens; NaN if the run diverged."""
        return np.nan if self.diverged else float(self.evaluations()[1][-1])

    def seconds_at(self, steps: np.ndarray) -> np.ndarray:
        """Return the seconds of the first ``steps`` steps, without evaluations, checkpoints and compilations."""
        each = [self.step_seconds[self.arm.lengths(step)] for step in range(self.arm.num_steps)]
        return self._sums_at(steps, each)

    def tokens_at(self, steps: np.ndarray) -> np.ndarray:
        """Return the tokens of the first ``steps`` steps."""
        each = [self.arm.batch_size * self.arm.lengths(step) for step in range(self.arm.num_steps)]
        return self._sums_at(steps, each)

    def _sums_at(self, steps: np.ndarray, each: Sequence[float | int]) -> np.ndarray:
        sums = np.cumsum([0.0, *each])
        return np.asarray(np.interp(steps, np.arange(len(sums)), sums))

    def steps_to(self, loss: float) -> float:
        """Return the steps until the validation loss is at most ``loss``, interpolated between evaluations; NaN if it never is."""
        steps, losses = self.evaluations()
        steps, losses = steps[np.isfinite(losses)], losses[np.isfinite(losses)]
        below = np.flatnonzero(losses <= loss)
        if not below.size:
            return np.nan
        last = below[0]
        if last == 0:
            return float(steps[0])
        share = (losses[last - 1] - loss) / (losses[last - 1] - losses[last])
        return float(steps[last - 1] + share * (steps[last] - steps[last - 1]))

    def figures(self, reference: "Run") -> dict[str, float | int]:
        """Return the run's figures; NaN where a figure does not apply.

        Args:
            reference: The run of the same seed whose final validation loss this run should reach.
        """
        ratios, evaluated = loss_ratio(self.losses), self.evaluations()[1]
        reached = self.steps_to(reference.last_loss)
        after = slice(self.warmup, None)
        named = {
            "val_loss": self.last_loss,
            "unstable_steps": unstable_steps(self.losses, self.threshold),
            "greatest_loss_ratio": _greatest(ratios),
            "greatest_pooled_loss_ratio": _greatest(loss_ratio(self.pooled_losses())),
            "greatest_val_loss_ratio": _greatest(loss_ratio(evaluated)),
            "grad_norm": _greatest(self.steps("grad_norm")[after]),
            "diverged": int(self.diverged),
            "seconds": float(self.seconds_at(np.array(len(self.losses)))),
            "reached": int(np.isfinite(reached)),
            "tokens_to_reach": float(self.tokens_at(np.array(reached))),
            "seconds_to_reach": float(self.seconds_at(np.array(reached))),
        }
        for name in ("variance_norm", "variance_max"):
            values = self.steps(name)[after]
            named[name] = _greatest(values)
            named[f"correlation_{name}"] = correlation(ratios[after], values)
        return named


def read(folder: pathlib.Path, arm: Arm, config: Config) -> list[Run]:
    """Read the runs of an arm, one per seed."""
    places = [folder / f"seed-{seed}" / arm.name for seed in range(config.seeds)]
    timing = [r for place in places for r in _lines(place / "timing.jsonl")]
    return [
        Run(
            arm=arm,
            records=read_jsonl(place / "metrics.jsonl"),
            step_seconds=step_seconds(arm, timing),
            warmup=config.warmup,
            threshold=config.threshold,
            window=config.batch_size * config.batch_factor * config.length,
        )
        for place in places
    ]


def step_seconds(arm: Arm, timing: Records) -> dict[int, float]:
    """Return the seconds of a step by length: the median, which a few slow steps do not affect.

    For a length without timed steps, the value is interpolated between neighboring lengths.
    """
    times: dict[int, list[float]] = {length: [] for length in arm.lengths.values}
    for record in timing:
        length = arm.lengths(record["step"] - 1)
        times[length].append(arm.batch_size * length / record["tokens_per_second"])
    known = {length: float(np.median(values)) for length, values in times.items() if values}
    if not known:
        return dict.fromkeys(times, 0.0)
    return {length: float(np.interp(length, [*known], [*known.values()])) for length in times}


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Pearson's correlation over the steps at which both are finite; NaN if one of them does not vary.

    >>> correlation(np.array([1.0, 2.0, np.nan, 3.0]), np.array([2.0, 4.0, 5.0, 6.0]))
    1.0
    """
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return np.nan
    return round(float(np.corrcoef(a, b)[0, 1]), 12)


def figures(runs: Mapping[str, Sequence[Run]]) -> dict[str, float | int | None]:
    """Return the named figures of all arms: means over seeds, counts of seeds, and some standard deviations.

    Args:
        runs: Runs by arm; must include ``small``.
    """
    named: dict[str, float | int | None] = {}
    for arm, seeds in runs.items():
        each = [run.figures(small) for run, small in zip(seeds, runs["small"], strict=True)]
        named[f"{arm}_steps"] = seeds[0].arm.num_steps
        named[f"{arm}_lengths"] = len(seeds[0].arm.lengths.values)
        for name in each[0]:
            values = np.array([one[name] for one in each], np.float64)
            values = values[np.isfinite(values)]
            if name in ("diverged", "reached"):
                named[f"{arm}_{name}"] = int(values.sum())
                continue
            named[f"{arm}_{name}"] = float(values.mean()) if values.size else None
            if name in SPREAD:
                spread = values.std(ddof=1) if values.size > 1 else 0.0
                named[f"{arm}_{name}_std"] = float(spread) if values.size else None
    return named


def quality_rows(runs: Mapping[str, Sequence[Run]], named: Mapping[str, Any]) -> list[list[str]]:
    """Return a heading and one row per arm: batch size, learning rate, and the final validation loss of each seed."""
    seeds = len(runs["small"])
    columns = [f"seed {seed}" for seed in range(seeds)]
    rows = [["arm", "rows x rate", *columns, "mean", "std"]]
    for arm, each in runs.items():
        last = [run.last_loss for run in each]
        numbers = [*last, named[f"{arm}_val_loss"], named[f"{arm}_val_loss_std"]]
        what = f"{each[0].arm.batch_size} x {each[0].arm.learning_rate:g}"
        rows.append([title(arm), what, *(_shown(number, 3) for number in numbers)])
    return rows


def loss_rows(runs: Mapping[str, Sequence[Run]], named: Mapping[str, Any]) -> list[list[str]]:
    """Return a heading and one row per arm: how far the loss rose above its minimum so far."""
    rows = [["arm", "diverged", "unstable steps", "loss ratio", "pooled", "validation"]]
    for arm, each in runs.items():
        rows.append(
            [
                title(arm),
                f"{named[f'{arm}_diverged']} of {len(each)}",
                _shown(named[f"{arm}_unstable_steps"], 1),
                _shown(named[f"{arm}_greatest_loss_ratio"], 3),
                _shown(named[f"{arm}_greatest_pooled_loss_ratio"], 3),
                _shown(named[f"{arm}_greatest_val_loss_ratio"], 3),
            ]
        )
    return rows


def variance_rows(runs: Mapping[str, Sequence[Run]], named: Mapping[str, Any]) -> list[list[str]]:
    """Return a heading and one row per arm: Adam's variance, and its correlation with the loss ratio."""
    rows = [["arm", "", "norm", "correlation", "maximum", "correlation", "gradient norm"]]
    for arm in runs:
        values = [
            _shown(named[f"{arm}_{name}"], places)
            for name, places in (
                ("variance_norm", 1),
                ("correlation_variance_norm", 2),
                ("variance_max", 3),
                ("correlation_variance_max", 2),
                ("grad_norm", 1),
            )
        ]
        rows.append([title(arm), "", *values])
    return rows


def cost_rows(runs: Mapping[str, Sequence[Run]], named: Mapping[str, Any]) -> list[list[str]]:
    """Return a heading and one row per arm: the cost of a run, and the cost of reaching the small batch's final loss."""
    rows = [["arm", "reached", "steps", "seconds", "tokens to reach", "seconds to reach"]]
    for arm, each in runs.items():
        tokens = named[f"{arm}_tokens_to_reach"]
        rows.append(
            [
                title(arm),
                f"{named[f'{arm}_reached']} of {len(each)}",
                f"{named[f'{arm}_steps']:,}",
                _shown(named[f"{arm}_seconds"], 1),
                "n/a" if tokens is None else f"{tokens:,.0f}",
                _shown(named[f"{arm}_seconds_to_reach"], 1),
            ]
        )
    return rows


def tables(
    runs: Mapping[str, Sequence[Run]], named: Mapping[str, Any]
) -> dict[str, list[list[str]]]:
    """Return the tables of the report by title."""
    return {
        "Validation loss after all tokens": quality_rows(runs, named),
        "Greatest rise of the loss in a run, mean over seeds": loss_rows(runs, named),
        "Greatest values of Adam's variance and of the gradient norm after the warmup, mean over seeds, and the correlation of the "
        "variance with the loss ratio": variance_rows(runs, named),
        "Cost of a run, and cost of reaching the small batch's last loss": cost_rows(runs, named),
    }


def _greatest(values: np.ndarray) -> float:
    """Return the greatest finite value; NaN if no value is finite."""
    values = values[np.isfinite(values)]
    return float(values.max()) if values.size else np.nan


def _lines(file: pathlib.Path) -> list[dict[str, Any]]:
    return read_jsonl(file) if file.is_file() else []


def _shown(value: float | None, places: int) -> str:
    return "n/a" if value is None or not np.isfinite(value) else f"{value:.{places}f}"
