"""What the runs of the experiment ``moe`` showed: losses against training compute and time, parameters, tables, a figure."""

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
from effscale.experiments.shared.plotting import COLORS, STYLE, Records, pyplot, series
from effscale.experiments.shared.results import deviation
from effscale.ltd import training_flops
from effscale.models import Transformer, TransformerConfig
from effscale.training import read_jsonl

DENSE: tuple[ArmName, ...] = ("dense", "dense_2x", "dense_4x")

COMPARED: tuple[tuple[ArmName, ArmName, str], ...] = (
    ("moe", "dense", "experts at equal steps"),
    ("second_half", "first_half", "experts in the second half rather than the first"),
    ("residual", "top2", "a dense part and one expert rather than two experts"),
    ("moe_double", "moe", "twice as many experts"),
    ("pr_moe", "residual", "a pyramid rather than the same number everywhere"),
    ("pr_moe", "moe_double", "a residual pyramid rather than its largest number everywhere"),
    ("pr_moe_student", "pr_moe", "fewer layers"),
    ("pr_moe_kd", "pr_moe_student", "a teacher to the end rather than none"),
    ("pr_moe_mos", "pr_moe_student", "a teacher that leaves rather than none"),
    ("pr_moe_mos", "pr_moe_kd", "a teacher that leaves rather than stays"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runs:
    """An arm's runs, one per seed.

    Attributes:
        records: Each one's metrics.
        cpu_seconds: Processor time of each, compilation and evaluations included; unlike the clock's, it does not depend on what else the
            machine does.
        params: Parameters of the model.
        teraflops: Of the whole training; of a student's teacher forward passes are counted, its training is not.
    """

    records: Sequence[Records]
    cpu_seconds: Sequence[float]
    params: int
    teraflops: float

    @property
    def losses(self) -> np.ndarray:
        """Each seed's loss on all that is held out, after the last step, without what routers add."""
        return np.array([series(records, "val_loss")[1][-1] for records in self.records])


def count_params(model: TransformerConfig) -> int:
    """Parameters of a model that need not exist."""
    shapes = jax.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(shapes)))


def teraflops(config: Config, name: ArmName, vocab_size: int) -> float:
    """Of a training: products of forward and backward pass, and those of a teacher's forward pass while it is asked."""
    rows = config.steps_of(name) * config.batch_size
    total = rows * training_flops(config.transformer(name, vocab_size), config.length)
    arm = ARMS[name]
    if arm.teacher is not None:
        share = config.teacher_stop(name) / config.steps_of(name) if arm.leaves else 1.0
        teacher = training_flops(config.transformer(arm.teacher, vocab_size), config.length) / 3
        total += share * rows * teacher
    return total / 1e12


def read(folder: pathlib.Path, config: Config, vocab_size: int) -> dict[ArmName, Runs]:
    """All runs by arm."""
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
    """What dense models cost that reach a loss: interpolated between whole trainings of different lengths.

    The loss is taken as linear in the logarithm of the cost. None where the longest training does not reach it, or there is only
    one.

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
    """The named figures; differences are seed by seed."""
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
    """What dense training costs to reach the loss of moe, and how many times what moe costs; seed by seed."""
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
    """Losses with parameters and compute, and the comparisons; by title."""
    seeds = len(next(iter(runs.values())).records)
    each = [f"seed {seed}" for seed in range(seeds)]
    heading = ["arm", "", "parameters", "teraFLOPs", *each, "mean", "deviation"]
    losses = [heading]
    for name, found in runs.items():
        values = found.losses
        numbers = [f"{value:.3f}" for value in (*values, values.mean(), deviation(values))]
        counts = [f"{found.params:,}", f"{found.teraflops:,.1f}"]
        losses.append([name, ARMS[name].about, *counts, *numbers])
    compared = [["arm", "against", "what differs", *each, "mean", "deviation"]]
    for name, other, about in COMPARED:
        if name in runs and other in runs:
            values = runs[name].losses - runs[other].losses
            numbers = [f"{value:+.3f}" for value in (*values, values.mean())]
            compared.append([name, other, about, *numbers, f"{deviation(values):.3f}"])
    made = {"loss on the held-out text, nats per token": losses}
    return made | ({"difference in loss, seed by seed": compared} if len(compared) > 1 else {})


def draw(path: pathlib.Path, runs: Mapping[ArmName, Runs]) -> None:
    """The loss over training compute and over time, means over seeds, and the last loss over parameters, each seed a dot."""
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(12.0, 4.4), dpi=75)
        for number, (name, found) in enumerate(runs.items()):
            # A second round through the colors is dashed and hollow.
            color, again = COLORS[number % len(COLORS)], number >= len(COLORS)
            steps = series(found.records[0], "part_val_loss")[0]
            losses = np.mean([series(one, "part_val_loss")[1] for one in found.records], axis=0)
            style = {"color": color, "ls": "--" if again else "-", "lw": 1.3}
            axes[0].plot(found.teraflops * steps / steps[-1], losses, label=name, **style)
            axes[1].plot(np.mean(found.cpu_seconds) * steps / steps[-1], losses, **style)
            dots = {"color": color, "mfc": "none" if again else color, "ls": "", "marker": "o"}
            axes[2].plot([found.params / 1e6] * len(found.losses), found.losses, **dots)
        axes[0].set(
            xlabel="training compute (teraFLOPs)", ylabel="loss on a part of the held-out text"
        )
        axes[1].set(xlabel="processor time (s)")
        axes[2].set(xlabel="parameters (million)", ylabel="loss on all of the held-out text")
        handles = axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="upper center", ncols=6, fontsize=8)
        figure.tight_layout(rect=(0, 0, 1, 0.9))
        figure.savefig(path)
        plt.close(figure)


def _spread(name: str, values: np.ndarray) -> dict[str, float]:
    return {name: float(values.mean()), f"{name}_std": deviation(values)}
