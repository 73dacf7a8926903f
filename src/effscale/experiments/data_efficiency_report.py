"""What the runs of ``data_efficiency`` showed: losses and costs over seeds, what it takes to reach the baseline, figures."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from effscale.experiments.data_efficiency_runner import run_name
from effscale.experiments.finetune_report import markdown as table
from effscale.experiments.finetune_report import show_rows
from effscale.experiments.plotting import Records
from effscale.experiments.pretraining_plan import Plan, layer_tokens
from effscale.training import read_jsonl

COSTS = ("layer_tokens", "teraflops", "seconds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """The runs of a technique on a part of the budget, one a seed.

    Attributes:
        plan: The shapes and what they cost.
        evaluations: Of each seed, the records of the evaluations; all seeds have them at the same steps.
        step_seconds: Of each seed, a step's seconds by its shape.
        final_loss: Of each seed, the loss on all that is held out, after the last step.
        wall_seconds: Of each seed, the time of its run with all that belongs to it; of the first one with the compilations.
        num_compilations: Of the training step, for all seeds together.
        compilation_seconds: Their time.
    """

    plan: Plan
    evaluations: Sequence[Records]
    step_seconds: Sequence[Mapping[tuple[int, int], float]]
    final_loss: np.ndarray
    wall_seconds: np.ndarray
    num_compilations: int
    compilation_seconds: float

    @property
    def steps(self) -> np.ndarray:
        """The steps of the evaluations."""
        return np.array([r["step"] for r in self.evaluations[0]])

    def losses(self) -> np.ndarray:
        """Validation losses of shape ``(seeds, evaluations)``."""
        return np.array([[r["val_loss"] for r in records] for records in self.evaluations])

    def seconds_at(self, step: int) -> np.ndarray:
        """Of each seed, the time of the first ``step`` training steps."""
        stages = self.plan.stages
        steps = {
            shape: stages.total(step, lambda other, shape=shape: int(other == shape))
            for shape in dict.fromkeys(stages.values)
        }
        return np.array(
            [sum(steps[shape] * each[shape] for shape in steps) for each in self.step_seconds]
        )

    def cost_at(self, step: int, name: str) -> float:
        """What the first ``step`` steps cost; seconds are the mean over seeds."""
        if name == "seconds":
            return float(self.seconds_at(step).mean())
        consumed = self.plan.consumed(step)
        return consumed["flops"] / 1e12 if name == "teraflops" else float(consumed[name])

    def cost(self, name: str) -> float:
        """What the whole run cost."""
        return self.cost_at(self.plan.num_steps, name)

    def cost_of_reaching(self, loss: float, name: str) -> float | None:
        """What it cost until the mean validation loss fell to ``loss``, interpolated between evaluations; None: never."""
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
    """All runs, by technique and part of the budget."""

    arms: Mapping[tuple[str, float], Arm]

    @property
    def baseline(self) -> Arm:
        """Plain training on the whole budget."""
        return self.arms["none", 1.0]

    @property
    def target(self) -> float:
        """The baseline's mean loss at its last evaluation."""
        return float(self.baseline.losses()[:, -1].mean())

    def shares_to_baseline(self, arm: Arm) -> dict[str, float | None]:
        """The cost of reaching the baseline's last loss, as shares of what the baseline cost."""
        shares: dict[str, float | None] = {}
        for name in COSTS:
            cost = arm.cost_of_reaching(self.target, name)
            shares[name] = None if cost is None else cost / self.baseline.cost(name)
        return shares

    def saved_at_equal_steps(self, arm: Arm) -> dict[str, float]:
        """The shares that an arm saves of the baseline's costs when both make as many steps as the baseline."""
        steps = min(self.baseline.plan.num_steps, arm.plan.num_steps)
        return {
            name: 1 - arm.cost_at(steps, name) / self.baseline.cost_at(steps, name)
            for name in COSTS
        }

    def figures(self) -> dict[str, Any]:
        """The named figures; None where the baseline's loss is never reached."""
        named: dict[str, Any] = {}
        for (technique, fraction), arm in self.arms.items():
            prefix = f"{technique}_{100 * fraction:g}_"
            seconds = arm.seconds_at(arm.plan.num_steps)
            for name, values in {"val_loss": arm.final_loss, "seconds": seconds}.items():
                named[f"{prefix}{name}"] = float(values.mean())
                named[f"{prefix}{name}_min"] = float(values.min())
                named[f"{prefix}{name}_max"] = float(values.max())
            named[f"{prefix}wall_seconds"] = float(arm.wall_seconds.mean())
            named[f"{prefix}compilation_seconds"] = arm.compilation_seconds
            named[f"{prefix}compilations"] = arm.num_compilations
            named[f"{prefix}steps"] = arm.plan.num_steps
            consumed = arm.plan.consumed(arm.plan.num_steps)
            named |= {
                f"{prefix}{name}": consumed[name]
                for name in ("tokens_read", "tokens_trained", "layer_tokens")
            }
            named[f"{prefix}teraflops"] = arm.cost("teraflops")
        for technique in dict.fromkeys(technique for technique, _ in self.arms):
            if technique == "none":
                continue
            fractions = [f for t, f in self.arms if t == technique]
            shares = [self.shares_to_baseline(self.arms[technique, f]) for f in fractions]
            saved = self.saved_at_equal_steps(self.arms[technique, 1.0])
            for name in COSTS:
                reached = [share for s in shares if (share := s[name]) is not None]
                named[f"{technique}_{name}_to_baseline"] = min(reached) if reached else None
                named[f"{technique}_{name}_saved_at_equal_steps"] = saved[name]
        return named

    def loss_rows(self) -> list[list[str]]:
        """A heading and a row a technique and part of the budget: loss at the end and seconds, with their ranges."""
        rows = [["technique", "budget", "loss", "min..max", "seconds", "min..max"]]
        for (technique, fraction), arm in self.arms.items():
            loss, seconds = arm.final_loss, arm.seconds_at(arm.plan.num_steps)
            rows.append(
                [
                    *(technique, f"{100 * fraction:g} %"),
                    *(f"{loss.mean():.4f}", f"{loss.min():.4f}..{loss.max():.4f}"),
                    *(f"{seconds.mean():.1f}", f"{seconds.min():.1f}..{seconds.max():.1f}"),
                ]
            )
        return rows

    def cost_rows(self) -> list[list[str]]:
        """A heading and a row a technique and part of the budget: what a run takes, the same for every seed."""
        rows = [["technique", "budget", "steps", "tokens read", "layer tokens", "teraflops"]]
        for (technique, fraction), arm in self.arms.items():
            consumed = arm.plan.consumed(arm.plan.num_steps)
            rows.append(
                [
                    *(technique, f"{100 * fraction:g} %", f"{arm.plan.num_steps:,}"),
                    *(f"{consumed['tokens_read']:,}", f"{consumed['layer_tokens']:,}"),
                    f"{arm.cost('teraflops'):.3g}",
                ]
            )
        return rows

    def reach_rows(self) -> list[list[str]]:
        """A heading and a row a technique and part of the budget: the shares of the baseline's costs to reach its loss."""
        rows = [["technique", "budget", "layer tokens", "operations", "seconds"]]
        for (technique, fraction), arm in self.arms.items():
            shares = self.shares_to_baseline(arm).values()
            shown = ["n/a" if share is None else f"{100 * share:.0f} %" for share in shares]
            rows.append([technique, f"{100 * fraction:g} %", *shown])
        return rows

    def saving_rows(self) -> list[list[str]]:
        """A heading and a row a technique: the shares of the baseline's costs saved at equal steps."""
        rows = [["technique", "steps", "layer tokens", "operations", "seconds"]]
        steps = f"{self.baseline.plan.num_steps:,}"
        for (technique, fraction), arm in self.arms.items():
            if technique != "none" and fraction == 1.0:
                saved = self.saved_at_equal_steps(arm).values()
                rows.append([technique, steps, *(f"{100 * share:.1f} %" for share in saved)])
        return rows


def read(folder: pathlib.Path, config: Any, vocab_size: int) -> Comparison:
    """The comparison from the runs in a run folder.

    Args:
        folder: The run folder.
        config: A ``data_efficiency.Config``.
        vocab_size: The tokenizer's.
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
                final_loss=np.array([each["val_loss"] for each in final]),
                wall_seconds=np.array([each["seconds"] for each in done]),
                # A run after a resume may have compiled anew.
                num_compilations=max(each["num_compilations"] for each in final),
                compilation_seconds=max(each["compilation_seconds"] for each in final),
            )
    return Comparison(arms=arms)


def step_seconds(timing: pathlib.Path, plan: Plan) -> dict[tuple[int, int], float]:
    """Seconds of a step by shape: the median over a run's steps, which leaves out those that something else disturbed.

    A shape of which no step was timed takes what lies between its neighbours', by layer-averaged tokens.
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


def markdown(comparison: Comparison) -> str:
    """The tables of the report."""
    return "\n\n".join(
        [
            "Loss on all held-out tokens at the end, in nats a token, and seconds of training steps, without compilations and "
            "evaluations; mean and range over seeds:",
            table(comparison.loss_rows()),
            "What a run takes:",
            table(comparison.cost_rows()),
            f"What it takes to fall to the baseline's loss at its last evaluation ({comparison.target:.4f}), as shares of all that "
            "the baseline took; n/a: not reached:",
            table(comparison.reach_rows()),
            "Saved by the schedules when as many steps are made as the baseline's:",
            table(comparison.saving_rows()),
        ]
    )


def show(comparison: Comparison) -> None:
    """Prints the tables."""
    show_rows("loss at the end, seconds of training steps", comparison.loss_rows())
    show_rows("what a run takes", comparison.cost_rows())
    show_rows("shares of the baseline's costs to reach its loss", comparison.reach_rows())
    show_rows("saved at equal steps", comparison.saving_rows())
