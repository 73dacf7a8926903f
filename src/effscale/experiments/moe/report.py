"""Results of the experiment ``moe``: losses against training compute and time, and numbers of parameters."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from flax import nnx

from effscale.experiments.moe.arms import ARMS, ArmName
from effscale.experiments.moe.config import Config
from effscale.experiments.shared.plotting import (
    COLORS,
    STYLE,
    Records,
    band,
    pyplot,
    series,
    shrink,
)
from effscale.experiments.shared.results import deviation
from effscale.ltd import training_flops
from effscale.models import Transformer, TransformerConfig
from effscale.training import read_jsonl

DENSE: tuple[ArmName, ...] = ("dense", "dense_2x", "dense_4x")

COMPARED: tuple[tuple[ArmName, ArmName, str], ...] = (
    ("moe", "dense", "experts in every second layer, against none"),
    ("second_half", "first_half", "experts in the second half of the layers, against the first"),
    ("residual", "top2", "one expert and a dense part, against two experts"),
    ("moe_double", "moe", "twice as many experts, against the plain mixture"),
    ("pr_moe", "residual", "a residual pyramid, against the same number everywhere"),
    ("pr_moe", "moe_double", "a residual pyramid, against its largest number everywhere"),
    ("pr_moe_student", "pr_moe", "a student without a teacher, against the full pyramid"),
    ("pr_moe_kd", "pr_moe_student", "a teacher that stays, against none"),
    ("pr_moe_mos", "pr_moe_student", "a teacher that leaves, against none"),
    ("pr_moe_mos", "pr_moe_kd", "a teacher that leaves, against one that stays"),
)

CURVES: tuple[ArmName, ...] = (
    "dense",
    "dense_2x",
    "moe",
    "first_half",
    "second_half",
    "pr_moe",
    "pr_moe_mos",
)
"""The arms whose curves are drawn; more would be hard to distinguish."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runs:
    """An arm's runs, one per seed.

    Attributes:
        records: Metrics of each run.
        cpu_seconds: Processor time of each run, including compilation and evaluations. Unlike wall-clock time, it hardly depends on
            other load on the machine.
        params: Number of parameters of the model.
        teraflops: Operations of the whole training. For a student, this includes the teacher's forward passes but not the teacher's
            training.
    """

    records: Sequence[Records]
    cpu_seconds: Sequence[float]
    params: int
    teraflops: float

    @property
    def losses(self) -> np.ndarray:
        """Loss on all held-out text after the last step, for each seed, without the routers' auxiliary losses."""
        return np.array([series(records, "val_loss")[1][-1] for records in self.records])


def count_params(model: TransformerConfig) -> int:
    """Count the parameters of a model without creating it."""
    shapes = jax.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(shapes)))


def teraflops(config: Config, name: ArmName, vocab_size: int) -> float:
    """Return the teraFLOPs of a training: matrix products of both passes, and of the teacher's forward passes while it is used."""
    rows = config.steps_of(name) * config.batch_size
    total = rows * training_flops(config.transformer(name, vocab_size), config.length)
    arm = ARMS[name]
    if arm.teacher is not None:
        share = config.teacher_stop(name) / config.steps_of(name) if arm.leaves else 1.0
        teacher = training_flops(config.transformer(arm.teacher, vocab_size), config.length) / 3
        total += share * rows * teacher
    return total / 1e12


def read(folder: pathlib.Path, config: Config, vocab_size: int) -> dict[ArmName, Runs]:
    """Read all runs by arm."""
    found: dict[ArmName, Runs] = {}
    for name in config.arms:
        places = [folder / f"seed-{seed}" / name for seed in range(config.seeds)]
        done = [json.loads((place / "done.json").read_text(encoding="utf-8")) for place in places]
        found[name] = Runs(
            records=[read_jsonl(place / "metrics.jsonl") for place in places],
            cpu_seconds=[one["cpu_seconds"] for one in done],
            params=count_params(config.transformer(name, vocab_size)),
            teraflops=teraflops(config, name, vocab_size),
        )
    return found


def cost_to_reach(loss: float, costs: Sequence[float], losses: Sequence[float]) -> float | None:
    """Return the cost at which dense models reach a loss, interpolated between whole trainings of different lengths.

    The loss is assumed to be linear in the logarithm of the cost. None if the longest training does not reach the loss, or if
    there is only one training.

    Example:
        >>> cost_to_reach(2.5, [1.0, 4.0], [3.0, 2.0])
        2.0
    """
    known = list(zip(costs, losses, strict=True))
    for (cost, above), (more, below) in itertools.pairwise(known):
        if above >= loss >= below and above > below:
            share = (above - loss) / (above - below)
            return float(cost * (more / cost) ** share)
    return None


def figures(runs: Mapping[ArmName, Runs]) -> dict[str, float | int | None]:
    """Return the named figures; differences are computed for each seed."""
    named: dict[str, float | int | None] = {}
    for name, found in runs.items():
        named |= _spread(f"{name}_val_loss", found.losses)
        named[f"{name}_params"] = found.params
        named[f"{name}_teraflops"] = found.teraflops
        named[f"{name}_cpu_seconds"] = float(np.mean(found.cpu_seconds))
    for name, other, _ in COMPARED:
        if name in runs and other in runs:
            named |= _spread(f"{name}_over_{other}", runs[name].losses - runs[other].losses)
    if "moe" in runs and "dense" in runs:
        named |= _dense_over_moe("teraflops", runs, lambda run, seed: run.teraflops)
        named |= _dense_over_moe("cpu_seconds", runs, lambda run, seed: run.cpu_seconds[seed])
    return named


def _dense_over_moe(
    what: str, runs: Mapping[ArmName, Runs], cost: Callable[[Runs, int], float]
) -> dict[str, float | None]:
    """Return the cost at which dense training reaches the loss of moe, and its ratio to the cost of moe, for each seed."""
    dense = [runs[name] for name in DENSE if name in runs]
    reached, times = [], []
    for seed, loss in enumerate(runs["moe"].losses):
        losses = [float(run.losses[seed]) for run in dense]
        found = cost_to_reach(float(loss), [cost(run, seed) for run in dense], losses)
        if found is None:
            return {f"dense_{what}_to_moe_loss": None, f"dense_{what}_over_moe": None}
        reached.append(found)
        times.append(found / cost(runs["moe"], seed))
    mean: dict[str, float | None] = {f"dense_{what}_to_moe_loss": float(np.mean(reached))}
    return mean | _spread(f"dense_{what}_over_moe", np.array(times))


def tables(runs: Mapping[ArmName, Runs]) -> dict[str, list[list[str]]]:
    """Return the tables by title: losses with parameters and compute, and the comparisons."""
    seeds = len(next(iter(runs.values())).records)
    each = [f"seed {seed}" for seed in range(seeds)]
    losses = [["arm", "parameters", "teraFLOPs", *each, "mean", "std"]]
    for name, found in runs.items():
        values = found.losses
        numbers = [f"{value:.3f}" for value in (*values, values.mean(), deviation(values))]
        counts = [f"{found.params:,}", f"{found.teraflops:,.1f}"]
        losses.append([ARMS[name].about, *counts, *numbers])
    compared = [["what is compared", *each, "mean", "std"]]
    for name, other, about in COMPARED:
        if name in runs and other in runs:
            values = runs[name].losses - runs[other].losses
            numbers = [f"{value:+.3f}" for value in (*values, values.mean())]
            compared.append([about, *numbers, f"{deviation(values):.3f}"])
    made = {"Loss on all held-out text, in nats per token": losses}
    return made | ({"Difference in loss, seed by seed": compared} if len(compared) > 1 else {})


def draw(folder: pathlib.Path, runs: Mapping[ArmName, Runs]) -> None:
    """Draw ``losses.png``, the final loss of each arm, and ``curves.png``, the loss over compute and over time.

    Args:
        folder: The folder to write to.
        runs: Runs by arm.
    """
    draw_losses(
        folder / "losses.png",
        {ARMS[name].about: (found.losses, found.teraflops) for name, found in runs.items()},
    )
    plt = pyplot()
    shown = [name for name in CURVES if name in runs] or list(runs)[: len(COLORS)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.2), dpi=90, sharey=True)
        for color, name in zip(COLORS, shown, strict=False):
            found = runs[name]
            steps = series(found.records[0], "part_val_loss")[0]
            curves = [series(one, "part_val_loss")[1] for one in found.records]
            for panel, cost in zip(
                axes, (found.teraflops, float(np.mean(found.cpu_seconds))), strict=True
            ):
                costs = cost * steps / steps[-1]
                band(panel, costs, curves, color=color, label=ARMS[name].about, lw=1.3)
        axes[0].set(
            xlabel="training compute (teraFLOPs)",
            ylabel="loss on part of the held-out text\n(nats per token)",
        )
        axes[1].set(xlabel="processor time (seconds)")
        axes[1].legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(folder / "curves.png")
        plt.close(figure)
    shrink(folder / "curves.png")


def draw_losses(
    path: pathlib.Path, losses: Mapping[str, tuple[Sequence[float] | np.ndarray, float]]
) -> None:
    """Draw the final loss of each arm: one dot per seed, a line at their mean, and the compute next to the name.

    Args:
        path: The PNG to write.
        losses: The final loss of each seed and the teraFLOPs of a run, by name.
    """
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.5, 0.34 * len(losses) + 1.1), dpi=100)
        for place, (values, _) in enumerate(losses.values()):
            color = COLORS[0]
            axes.plot(values, np.full(len(values), place), "o", color=color, alpha=0.5, ms=5)
            axes.vlines(float(np.mean(values)), place - 0.3, place + 0.3, color=color, lw=2)
        names = [f"{name} ({compute:.1f})" for name, (_, compute) in losses.items()]
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set(xlabel="final loss (nats per token)", ylabel="arm (teraFLOPs)")
        figure.tight_layout()
        figure.savefig(path)
        plt.close(figure)
    shrink(path)


def _spread(name: str, values: np.ndarray) -> dict[str, float]:
    return {name: float(values.mean()), f"{name}_std": deviation(values)}
