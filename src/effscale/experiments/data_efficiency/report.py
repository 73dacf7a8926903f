"""Results of ``data_efficiency``: losses and costs over seeds, and the cost of reaching the baseline's loss."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from effscale.experiments.data_efficiency.config import Config
from effscale.experiments.data_efficiency.runs import run_name
from effscale.experiments.shared.pretraining_plan import Plan, Technique, layer_tokens
from effscale.study.results import deviation
from effscale.study.search import Found
from effscale.training import read_jsonl
from effscale.training.plotting import Records

COSTS = {
    "tokens_read": "tokens read",
    "tokens_trained": "tokens trained",
    "layer_tokens": "layer tokens",
    "teraflops": "operations",
    "seconds": "seconds",
}
"""The costs that are compared, with their headings in tables."""

NAMES: dict[Technique, str] = {
    "none": "plain training",
    "cl": "curriculum",
    "ltd": "random-LTD",
    "cl_ltd": "curriculum + random-LTD",
}
"""The name of each technique in tables and figures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """The runs of a technique on a fraction of the budget, one per seed.

    Attributes:
        plan: The shapes and their cost.
        evaluations: Records of the evaluations for each seed; at the same steps for all seeds, except those that diverged.
        step_seconds: Seconds of a step by shape, for each seed.
        final_loss: Loss on all held-out text after the last step, for each seed; NaN if the run diverged.
        wall_seconds: Duration of the whole run for each seed; that of the first seed includes the compilations.
        num_compilations: Compilations of the training step, for all seeds together.
    """

    plan: Plan
    evaluations: Sequence[Records]
    step_seconds: Sequence[Mapping[tuple[int, int], float]]
    final_loss: np.ndarray
    wall_seconds: np.ndarray
    num_compilations: int

    @property
    def diverged(self) -> int:
        """Number of runs that diverged; if there are any, the arm has no mean loss."""
        return int(np.isnan(self.final_loss).sum())

    @property
    def steps(self) -> np.ndarray:
        """The steps of the evaluations."""
        return np.array(sorted({r["step"] for records in self.evaluations for r in records}), int)

    def losses(self) -> np.ndarray:
        """Return the validation losses, of shape ``(seeds, evaluations)``; NaN after the end of a run that diverged."""
        steps = self.steps.tolist()
        found = [{r["step"]: r["val_loss"] for r in records} for records in self.evaluations]
        each = [[losses.get(step) for step in steps] for losses in found]
        return np.array(each, np.float64)  # None becomes NaN

    def seconds_at(self, step: int) -> np.ndarray:
        """Return the seconds of the first ``step`` training steps for each seed."""
        stages = self.plan.stages
        steps = {
            shape: stages.total(step, lambda other, shape=shape: int(other == shape))
            for shape in dict.fromkeys(stages.values)
        }
        return np.array(
            [sum(steps[shape] * each[shape] for shape in steps) for each in self.step_seconds]
        )

    def cost_at(self, step: int, name: str) -> float:
        """Return the cost of the first ``step`` steps; seconds are the mean over seeds."""
        if name == "seconds":
            return float(self.seconds_at(step).mean())
        consumed = self.plan.consumed(step)
        return consumed["flops"] / 1e12 if name == "teraflops" else float(consumed[name])

    def cost(self, name: str) -> float:
        """Return the cost of the whole run."""
        return self.cost_at(self.plan.num_steps, name)

    def cost_of_reaching(self, loss: float, name: str) -> float | None:
        """Return the cost until the mean validation loss fell to ``loss``, interpolated between evaluations.

        None if it never fell that far, or if a run diverged.
        """
        if self.diverged:
            return None
        mean = self.losses().mean(axis=0)
        below = np.flatnonzero(mean <= loss)
        if not len(below):
            return None
        costs = [self.cost_at(int(step), name) for step in self.steps]
        last = int(below[0])
        if last == 0:
            return costs[0]
        share = (mean[last - 1] - loss) / (mean[last - 1] - mean[last])
        return float(costs[last - 1] + share * (costs[last] - costs[last - 1]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """All runs by technique and fraction of the budget, and the result of each technique's search."""

    arms: Mapping[tuple[Technique, float], Arm]
    found: Mapping[Technique, Found] = dataclasses.field(default_factory=dict)

    @property
    def baseline(self) -> Arm:
        """Plain training on the whole budget."""
        return self.arms["none", 1.0]

    @property
    def target(self) -> float:
        """The baseline's mean loss at its last evaluation; NaN if one of its runs diverged."""
        if self.baseline.diverged:
            return np.nan
        return float(self.baseline.losses()[:, -1].mean())

    def shares_to_baseline(self, arm: Arm) -> dict[str, float | None]:
        """Return the cost of reaching the baseline's last loss, as a share of the baseline's cost."""
        shares: dict[str, float | None] = {}
        for name in COSTS:
            cost = arm.cost_of_reaching(self.target, name)
            shares[name] = None if cost is None else cost / self.baseline.cost(name)
        return shares

    def saved_at_equal_steps(self, arm: Arm) -> dict[str, float | None]:
        """Return the shares of the baseline's costs that an arm saves in the same number of steps.

        None for the seconds if a run diverged.
        """
        steps = min(self.baseline.plan.num_steps, arm.plan.num_steps)
        return {
            name: None
            if name == "seconds" and (arm.diverged or self.baseline.diverged)
            else 1 - arm.cost_at(steps, name) / self.baseline.cost_at(steps, name)
            for name in COSTS
        }

    def difference(self, technique: Technique, fraction: float) -> np.ndarray:
        """Return the final loss minus that of plain training on the same fraction, for each seed; NaN if either run diverged."""
        plain = self.arms["none", fraction]
        return self.arms[technique, fraction].final_loss - plain.final_loss

    def seeds(self) -> dict[str, list[float | None]]:
        """Return the final loss of each seed by arm; None if the run diverged."""
        return {
            f"{_prefix(technique, fraction)}val_loss": [
                None if np.isnan(loss) else float(loss) for loss in arm.final_loss
            ]
            for (technique, fraction), arm in self.arms.items()
        }

    def figures(self) -> dict[str, Any]:
        """Return the named figures; None if the baseline's loss is not reached, or if a run diverged that the figure needs."""
        named: dict[str, Any] = {}
        for technique, found in self.found.items():
            named[f"{technique}_learning_rate"] = found.best.learning_rate
            named[f"{technique}_warmup"] = found.best.warmup
            named[f"{technique}_search_runs"] = len(found.losses)
            named[f"{technique}_search_settled"] = int(found.settled)
        for (technique, fraction), arm in self.arms.items():
            prefix = _prefix(technique, fraction)
            seconds = arm.seconds_at(arm.plan.num_steps)
            for name, values in {"val_loss": arm.final_loss, "seconds": seconds}.items():
                for suffix, value in zip(("", "_min", "_max"), _range(values), strict=True):
                    named[f"{prefix}{name}{suffix}"] = None if arm.diverged else value
            if technique != "none":
                difference = self.difference(technique, fraction)
                broken = bool(np.isnan(difference).any())
                named[f"{prefix}difference"] = None if broken else float(difference.mean())
                named[f"{prefix}difference_std"] = None if broken else deviation(difference)
            named[f"{prefix}diverged"] = arm.diverged
            named[f"{prefix}wall_seconds"] = float(arm.wall_seconds.mean())
            named[f"{prefix}compilations"] = arm.num_compilations
            named[f"{prefix}steps"] = arm.plan.num_steps
            consumed = arm.plan.consumed(arm.plan.num_steps)
            named |= {
                f"{prefix}{name}": consumed[name]
                for name in ("tokens_read", "tokens_trained", "layer_tokens")
            }
            named[f"{prefix}teraflops"] = arm.cost("teraflops")
        for technique in dict.fromkeys(technique for technique, _ in self.arms):
            fractions = [f for t, f in self.arms if t == technique]
            shares = [self.shares_to_baseline(self.arms[technique, f]) for f in fractions]
            for name in COSTS:
                reached = [share for s in shares if (share := s[name]) is not None]
                least = min(reached) if reached else None
                named[f"{technique}_{name}_to_baseline"] = least
                named[f"{technique}_{name}_saved"] = None if least is None else 1 - least
            if technique != "none":
                saved = self.saved_at_equal_steps(self.arms[technique, 1.0])
                named |= {f"{technique}_{n}_saved_at_equal_steps": saved[n] for n in COSTS}
        return named

    def search_rows(self) -> list[list[str]]:
        """Return a heading and one row per technique: the result of the search."""
        rows = [["technique", "learning rate", "warmup", "loss", "runs", "neighbors"]]
        for technique, found in self.found.items():
            loss = found.losses.get(found.best)
            rows.append(
                [
                    *(NAMES[technique], f"{found.best.learning_rate:g}"),
                    f"{found.best.warmup} steps",
                    *("n/a" if loss is None else f"{loss:.4f}", f"{len(found.losses)}"),
                    "all worse" if found.settled else "not all tried",
                ]
            )
        return rows

    def loss_rows(self) -> list[list[str]]:
        """Return a heading and one row per technique and fraction: the final loss, and its difference from that of plain training."""
        heading = ["technique", "budget", "loss", "range", "minus plain training", "std"]
        rows = [heading]
        for (technique, fraction), arm in self.arms.items():
            head = [NAMES[technique], f"{100 * fraction:g} %"]
            if arm.diverged:
                seeds = f"{arm.diverged} of {len(arm.final_loss)} seeds"
                rows.append([*head, "diverged", seeds, "n/a", "n/a"])
                continue
            loss, low, high = _range(arm.final_loss)
            difference = self.difference(technique, fraction)
            against = ["", ""]
            if technique != "none":
                broken = np.isnan(difference).any()
                spread = f"{deviation(difference):.4f}"
                against = ["n/a", "n/a"] if broken else [f"{difference.mean():+.4f}", spread]
            rows.append([*head, f"{loss:.4f}", f"{low:.4f} to {high:.4f}", *against])
        return rows

    def cost_rows(self) -> list[list[str]]:
        """Return a heading and one row per technique and fraction: the cost of a run, which is the same for every seed."""
        counts = ("tokens_read", "tokens_trained", "layer_tokens")
        headings = [*(COSTS[name] for name in counts), "teraflops", "seconds"]
        rows = [["technique", "budget", "steps", *headings]]
        for (technique, fraction), arm in self.arms.items():
            consumed = arm.plan.consumed(arm.plan.num_steps)
            rows.append(
                [
                    *(NAMES[technique], f"{100 * fraction:g} %", f"{arm.plan.num_steps:,}"),
                    *(f"{consumed[name]:,}" for name in counts),
                    f"{arm.cost('teraflops'):.3g}",
                    "n/a" if arm.diverged else f"{arm.cost('seconds'):.0f}",
                ]
            )
        return rows

    def reach_rows(self) -> list[list[str]]:
        """Return a heading and one row per technique and fraction: the cost of reaching the baseline's loss, as shares of its costs."""
        rows = [["technique", "budget", *COSTS.values()]]
        for (technique, fraction), arm in self.arms.items():
            shares = self.shares_to_baseline(arm).values()
            shown = [_percent(share, 0) for share in shares]
            rows.append([NAMES[technique], f"{100 * fraction:g} %", *shown])
        return rows

    def saving_rows(self) -> list[list[str]]:
        """Return a heading and one row per technique: the shares of the baseline's costs saved in the same number of steps."""
        rows = [["technique", "steps", *COSTS.values()]]
        steps = f"{self.baseline.plan.num_steps:,}"
        for (technique, fraction), arm in self.arms.items():
            if technique != "none" and fraction == 1.0:
                saved = self.saved_at_equal_steps(arm).values()
                rows.append([NAMES[technique], steps, *(_percent(share, 1) for share in saved)])
        return rows


def read(
    folder: pathlib.Path, config: Config, vocab_size: int, found: Mapping[Technique, Found]
) -> Comparison:
    """Read the comparison from a run folder.

    Args:
        folder: The run folder.
        config: Config of the experiment.
        vocab_size: Vocabulary size of the tokenizer.
        found: The result of the search for each technique.
    """
    arms = {}
    for technique in config.techniques:
        for fraction in config.fractions:
            places = [folder / run_name(technique, fraction, seed) for seed in range(config.seeds)]
            plan = config.pretraining(technique, fraction).plan(vocab_size)
            records = [read_jsonl(place / "metrics.jsonl") for place in places]
            final, done = (
                [json.loads((place / name).read_text(encoding="utf-8")) for place in places]
                for name in ("final.json", "done.json")
            )
            arms[technique, fraction] = Arm(
                plan=plan,
                evaluations=[[r for r in each if "val_loss" in r] for each in records],
                step_seconds=[step_seconds(place / "timing.jsonl", plan) for place in places],
                final_loss=np.array([each["val_loss"] for each in final], np.float64),
                wall_seconds=np.array([each["seconds"] for each in done]),
                # A resumed run may have compiled again; a run that diverged has no count.
                num_compilations=max(each.get("num_compilations", 0) for each in final),
            )
    return Comparison(arms=arms, found=found)


def step_seconds(timing: pathlib.Path, plan: Plan) -> dict[tuple[int, int], float]:
    """Return the seconds of a step by shape: the median over a run's steps, which a few slow steps do not affect.

    For a shape without timed steps, the value is interpolated between neighboring shapes by layer-averaged tokens.
    """
    tokens = {
        shape: plan.batch_size * layer_tokens(plan.model, shape) for shape in plan.stages.values
    }
    times: dict[tuple[int, int], list[float]] = {}
    for record in read_jsonl(timing) if timing.is_file() else []:
        shape = plan.stages(record["step"] - 1)
        times.setdefault(shape, []).append(tokens[shape] / record["tokens_per_second"])
    if not times:
        return dict.fromkeys(tokens, 0.0)
    known = {shape: float(np.median(values)) for shape, values in times.items()}
    nearby = sorted((tokens[shape], seconds) for shape, seconds in known.items())
    counts, seconds = [count for count, _ in nearby], [each for _, each in nearby]
    between = lambda shape: float(np.interp(tokens[shape], counts, seconds))
    return {shape: known.get(shape, between(shape)) for shape in tokens}


def _prefix(technique: Technique, fraction: float) -> str:
    return f"{technique}_{100 * fraction:g}_"


def _range(values: np.ndarray) -> tuple[float, float, float]:
    """Return mean, minimum and maximum."""
    return float(values.mean()), float(values.min()), float(values.max())


def _percent(share: float | None, decimals: int) -> str:
    return "n/a" if share is None else f"{100 * share:.{decimals}f} %"


def tables(comparison: Comparison) -> dict[str, list[list[str]]]:
    """Return the tables of the report by title."""
    reached = (
        f"Cost to reach plain training's last loss ({comparison.target:.4f}), as a share of what plain training paid; "
        "n/a: not reached, or a run diverged"
    )
    return {
        "Result of the search: the learning rate and warmup with the lowest loss on the whole budget": comparison.search_rows(),
        "Final loss on all held-out tokens, in nats per token: mean and range over seeds, and the seed-by-seed difference from "
        "plain training on the same part of the budget, with its standard deviation": comparison.loss_rows(),
        "Cost of a run; seconds count training steps only, without compilation and evaluation": comparison.cost_rows(),
        reached: comparison.reach_rows(),
        "Saved by the schedules at the same number of steps as plain training": comparison.saving_rows(),
    }
