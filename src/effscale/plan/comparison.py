"""Compare steps with and without each technique, and decoding with each kind of weights."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from effscale.plan.cases import ONEBIT, SCHEDULED, Case, Technique
from effscale.plan.config import Config
from effscale.plan.estimate import Estimate, estimate
from effscale.plan.schedules import rounds, stages_of

Found = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A step, or the mean of a training's steps.

    Attributes:
        case: The compiled case; for a mean, the one without the technique.
        technique: Name of the technique.
        stage: Description of the step; "mean" for a mean.
        share: Fraction of the training's steps.
        operations: Operations of the model in a step, over all chips.
        along_data: Bytes that a chip sends along the axis ``data``.
        exchanged: Bytes that a chip sends in all-to-alls along the axis ``expert``.
        memory: Bytes per chip; the maximum over stages.
        fastest: Seconds if all traffic overlaps with computation.
        slowest: Seconds if no traffic overlaps with computation.
    """

    case: Case
    technique: Technique
    stage: str
    share: float
    operations: float
    along_data: float
    exchanged: float
    memory: float
    fastest: float
    slowest: float


NAMES: dict[Technique, str] = {
    "none": "none",
    "random_ltd": "random-LTD",
    "curriculum": "curriculum",
    "onebit_adam": "1-bit Adam",
    "zero_one_adam": "0/1 Adam",
    "onebit_lamb": "1-bit LAMB",
}
"""The name of each technique in tables."""

KINDS = {"in full": "uncompressed", "mean": "mean over the schedule"}
"""Names of some stages in tables; other stages are shown unchanged."""


def compared(config: Config, found: Found) -> list[Row]:
    """Return the steps of all techniques, each followed by the mean over its schedule.

    Techniques with a program that does not fit are left out.
    """
    fitting = {name: one for name, one in found.items() if "refused" not in one}
    rows: list[Row] = []
    cases = [case for case in config.cases() if case.decode is None]
    for plain in (case for case in cases if case.technique == "none"):
        if plain.name not in fitting:
            continue
        base = _row(_estimate(config, plain, fitting), "every step", 1.0)
        rows.append(base)
        for technique in config.technique:
            belongs = [
                case
                for case in cases
                if case.technique == technique and _only_technique_differs(case, plain)
            ]
            compiled = [case for case in belongs if case.name in fitting]
            if technique == "none" or not compiled or len(compiled) < len(belongs):
                continue
            rows += (
                _scheduled(config, base, compiled, fitting)
                if technique in SCHEDULED
                else _rounds(config, compiled[0], fitting)
            )
    return rows


def _only_technique_differs(case: Case, plain: Case) -> bool:
    """Return whether a case differs from the baseline only in its technique."""
    length = plain.length if case.technique == "curriculum" else case.length
    return dataclasses.replace(case, technique="none", kept=None, length=length) == plain


def _scheduled(config: Config, base: Row, cases: Sequence[Case], found: Found) -> Iterator[Row]:
    """Return the compiled stages, and the mean over all stages: operations are counted for each stage, times are interpolated."""
    plain, technique = base.case, cases[0].technique
    schedule = stages_of(plain, technique, config.efficiency, config.steps)
    by_size = {
        shape[1]: share for shape, share in zip(schedule.shapes, schedule.shares(), strict=True)
    }
    rows = {}
    for case in cases:
        size = case.length if case.kept is None else case.kept
        words = f"{size} of {plain.length} tokens"
        rows[size] = _row(_estimate(config, case, found), words, by_size[size])
    yield from rows.values()
    known = {**rows, plain.length: base}

    def mean(name: str) -> float:
        values = [getattr(row, name) for row in known.values()]
        each = np.interp(list(by_size), list(known), values)
        return float(each @ np.asarray(list(by_size.values())))

    consumed = schedule.plan.consumed(config.steps)
    yield Row(
        case=plain,
        technique=technique,
        stage="mean",
        share=1.0,
        operations=consumed["flops"] / config.steps,
        along_data=mean("along_data"),
        exchanged=mean("exchanged"),
        memory=max(row.memory for row in known.values()),
        fastest=mean("fastest"),
        slowest=mean("slowest"),
    )


def _rounds(config: Config, case: Case, found: Found) -> Iterator[Row]:
    """Return what the steps of a 1-bit optimizer send, by the branch of the program that they take, and the mean."""
    rows = []
    for words, branch, share in rounds(case.technique, config.steps):
        one = estimate(case, found[case.name], data_bandwidth=config.data_bandwidth, branch=branch)
        rows.append(_row(one, words, share))
    yield from rows

    def mean(name: str) -> float:
        return math.fsum(row.share * getattr(row, name) for row in rows)

    yield dataclasses.replace(
        rows[0],
        stage="mean",
        share=1.0,
        along_data=mean("along_data"),
        exchanged=mean("exchanged"),
        fastest=mean("fastest"),
        slowest=mean("slowest"),
    )


def _estimate(config: Config, case: Case, found: Found) -> Estimate:
    return estimate(case, found[case.name], data_bandwidth=config.data_bandwidth)


def _row(one: Estimate, stage: str, share: float) -> Row:
    return Row(
        case=one.case,
        technique=one.case.technique,
        stage=stage,
        share=share,
        operations=one.operations,
        along_data=one.sent_along("data"),
        exchanged=one.exchanged,
        memory=one.memory,
        fastest=one.fastest,
        slowest=one.slowest,
    )


def technique_table(rows: Sequence[Row]) -> list[list[str]]:
    """Return the table of the rows from `compared`."""
    head = ["model", "technique", "kind of step", "share of steps", "PFLOP", "sent along data, GB"]
    table = [[*head, "all-to-all of experts, GB", "memory, GB", "step, s"]]
    for row in rows:
        table.append(
            [
                *(row.case.model, NAMES[row.technique], KINDS.get(row.stage, row.stage)),
                "" if row.stage == "mean" else f"{100 * row.share:.1f} %",
                f"{row.operations / 1e15:,.4g}",
                *(f"{size / 1e9:,.3f}" for size in (row.along_data, row.exchanged)),
                *(f"{row.memory / 1e9:,.1f}", between(row.fastest, row.slowest, ".3f")),
            ]
        )
    return table


def decoding_table(estimates: Sequence[Estimate], found: Found) -> list[list[str]]:
    """Return the table of the decoding cases."""
    head = ["model", "weights", "mesh", "weights, GB", "cache, GB", "memory, GB", "fits"]
    table = [[*head, "reading, ms", "network, ms", "per token, ms", "tokens/s"]]
    for one in estimates:
        result, case = found[one.case.name], one.case
        sizes = (result["parameters"], result["cache"], one.memory)
        table.append(
            [
                *(case.model, str(case.decode), case.layout.partition("\n")[0]),
                *(f"{size / 1e9:,.2f}" for size in sizes),
                "yes" if one.fits else "no",
                f"{1e3 * one.compute:,.2f}",
                f"{1e3 * sum(one.network.values()):,.2f}",
                between(1e3 * one.fastest, 1e3 * one.slowest, ",.2f"),
                between(*one.tokens_per_second, ",.0f"),
            ]
        )
    return table


def technique_figures(rows: Sequence[Row]) -> dict[str, float]:
    """Return the named figures of each technique for the first layout of each model: those of the mean step, and of the step that sends one bit."""
    named: dict[str, float] = {}
    first: dict[str, Case] = {}
    for row in rows:
        plain = dataclasses.replace(row.case, technique="none", kept=None)
        begin = first.setdefault(row.case.model, plain)
        if begin.mesh != row.case.mesh or begin.accumulate != row.case.accumulate:
            continue
        name = f"{plain_name(row.case.model)}_{row.technique}"
        if row.stage in ("mean", "every step"):
            named |= {
                f"{name}_pflop": row.operations / 1e15,
                f"{name}_gb_along_data": row.along_data / 1e9,
                f"{name}_gb_of_all_to_alls": row.exchanged / 1e9,
                f"{name}_mean_step_seconds": row.slowest,
            }
        elif row.technique in ONEBIT:
            named[f"{name}_gb_along_data_{row.stage.replace(' ', '_')}"] = row.along_data / 1e9
    return named


def decoding_figures(estimates: Sequence[Estimate]) -> dict[str, float]:
    """Return the named figures of decoding for the first layout of each model."""
    named: dict[str, float] = {}
    for one in estimates:
        name = f"{plain_name(one.case.model)}_decode_{one.case.decode}"
        named.setdefault(f"{name}_gb_per_chip", one.memory / 1e9)
        named.setdefault(f"{name}_tokens_per_second", one.tokens_per_second[0])
    return named


def plain_name(model: str) -> str:
    """Return a model's name as used in figures."""
    return model.replace("-", "_").replace(".", "_")


def between(low: float, high: float, form: str) -> str:
    """Format a range, or a single figure if both ends look the same.

    >>> between(1.21, 1.52, ".1f"), between(1.21, 1.22, ".1f")
    ('1.2 to 1.5', '1.2')
    """
    first, second = f"{low:{form}}", f"{high:{form}}"
    return first if first == second else f"{first} to {second}"
