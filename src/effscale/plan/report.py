"""Tables and the figure of ``effscale.plan``."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from effscale.parallel.machines import machine
from effscale.plan.comparison import between, plain_name
from effscale.plan.config import Config
from effscale.plan.estimate import Estimate
from effscale.training.plotting import COLORS, STYLE, pyplot

DAY = 86_400
NEGLIGIBLE = 5e6
"""Collectives that send fewer bytes are left out of the tables."""


def pareto(estimates: Sequence[Estimate]) -> list[Estimate]:
    """Return the estimates of the Pareto front: no other estimate is better in both memory and time."""
    beats = lambda a, b: (
        a.memory <= b.memory
        and a.slowest <= b.slowest
        and (a.memory, a.slowest) != (b.memory, b.slowest)
    )
    return [one for one in estimates if not any(beats(other, one) for other in estimates)]


def fronts(estimates: Sequence[Estimate]) -> list[Estimate]:
    """Return the Pareto front of each model at each length."""
    kinds = dict.fromkeys((one.case.model, one.case.length) for one in estimates)
    return [
        one
        for kind in kinds
        for one in pareto([e for e in estimates if (e.case.model, e.case.length) == kind])
    ]


def _front_table(estimates: Sequence[Estimate]) -> dict[str, list[list[str]]]:
    """Return the table of the Pareto fronts; empty for a single case."""
    if len(estimates) < 2:
        return {}
    table = [["layout", "memory, GB", "fits", "step, s", "MFU, %"]]
    for one in sorted(
        fronts(estimates), key=lambda one: (one.case.model, one.case.length, one.memory)
    ):
        table.append(
            [
                *(title(one, estimates), f"{one.memory / 1e9:,.1f}", "yes" if one.fits else "no"),
                between(one.fastest, one.slowest, ".2f"),
                between(100 * one.mfu[0], 100 * one.mfu[1], ".0f"),
            ]
        )
    return {"Pareto front: no other layout needs both less memory and less time": table}


def best(estimates: Sequence[Estimate]) -> Estimate:
    """Return the fastest case that fits, or the smallest case if none fits."""
    fitting = [one for one in estimates if one.fits]
    if fitting:
        return min(fitting, key=lambda one: one.slowest)
    return min(estimates, key=lambda one: one.memory)


def figures(
    estimates: Sequence[Estimate], found: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """Return the named figures of each model's best case.

    Figures that end in ``if_overlapped`` assume that all traffic overlaps with computation, the others that none does.
    """
    named: dict[str, float] = {}
    for model in dict.fromkeys(one.case.model for one in estimates):
        one = best(_of(model, estimates))
        name = plain_name(model)
        named |= {
            f"{name}_gb_per_chip": one.memory / 1e9,
            f"{name}_mfu": one.mfu[0],
            f"{name}_mfu_if_overlapped": one.mfu[1],
            f"{name}_step_seconds": one.slowest,
            f"{name}_step_seconds_if_overlapped": one.fastest,
            f"{name}_compile_seconds": found[one.case.name]["compile_seconds"],
            f"{name}_compile_processor_seconds": found[one.case.name]["processor_seconds"],
        }
    return named


def tables(
    config: Config, estimates: Sequence[Estimate], found: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[list[str]]]:
    """Return the tables for the terminal and the page."""
    gb = lambda size: f"{size / 1e9:,.1f}"
    memory = [["layout", "parameters", "optimizer", "temporaries", "total", "available", "fits"]]
    head = ["compute, s", "network, s", "step, s", "MFU, %", "tokens/s", "days"]
    speed = [["layout", "PFLOP", *head]]
    traffic = [["layout", "collective", "mesh axis", "calls", "sent, GB"]]
    built = [["layout", "tracing, s", "compiling, s", "CPU time, s"]]
    chip = machine(config.topology).chip
    on_front = {one.case.name for one in fronts(estimates)}
    for one in estimates:
        raw, name = found[one.case.name], title(one, estimates)
        marked = name + (" *" if one.case.name in on_front and len(estimates) > 1 else "")
        memory.append(
            [
                *(marked, gb(raw["parameters"]), gb(raw["optimizer"]), gb(raw["temporaries"])),
                *(gb(one.memory), gb(chip.memory), "yes" if one.fits else "no"),
            ]
        )
        slow, fast = one.tokens_per_second
        speed.append(
            [
                *(marked, f"{one.operations / 1e15:,.4g}", f"{one.compute:.2f}"),
                f"{sum(one.network.values()):.2f}",
                between(one.fastest, one.slowest, ".2f"),
                between(100 * one.mfu[0], 100 * one.mfu[1], ".0f"),
                between(slow, fast, ",.0f"),
                between(config.tokens / fast / DAY, config.tokens / slow / DAY, ",.0f"),
            ]
        )
        for row in raw["collectives"]:
            if row["sent"] < NEGLIGIBLE:
                continue
            times, sent = f"{row['times']:,}", f"{row['sent'] / 1e9:,.2f}"
            branch = row.get("branch")
            kind = row["kind"] if branch is None else f"{row['kind']}, in branch {branch}"
            traffic.append([name, kind, "+".join(row["axes"]), times, sent])
        seconds = ("trace_seconds", "compile_seconds", "processor_seconds")
        built.append([name, *(f"{raw[key]:.0f}" for key in seconds)])
    return {
        "Memory per chip, GB": memory,
        f"Estimated speed on {config.topology}": speed,
        **_front_table(estimates),
        "Traffic per step and chip": traffic,
        "Compilation": built,
    }


def draw(path: pathlib.Path, config: Config, estimates: Sequence[Estimate]) -> None:
    """Draw the memory and time of each case, and the memory of the chip."""
    plt, chip = pyplot(), machine(config.topology).chip
    models = list(dict.fromkeys(one.case.model for one in estimates))
    on_front = fronts(estimates)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 3.8))
        for color, model in zip(COLORS * len(models), models, strict=False):
            for one in _of(model, estimates):
                place = one.memory / 1e9, (one.slowest + one.fastest) / 2
                spread = (one.slowest - one.fastest) / 2
                marker = "o" if one in on_front else "x"
                axes.errorbar(*place, yerr=spread, fmt=marker, color=color, capsize=3)
                up = -1 if one in on_front else 1
                offset = {"xytext": (0, 12 * up), "textcoords": "offset points", "ha": "center"}
                upright = "bottom" if up > 0 else "top"
                axes.annotate(_label(one, config), place, **offset, fontsize=7, va=upright)
            axes.plot([], [], "o", color=color, label=model)
        if len(on_front) < len(estimates):
            axes.plot([], [], "x", color="0.4", label="another layout needs less memory and time")
        axes.axvline(chip.memory / 1e9, color="0.6", linestyle="--", linewidth=1)
        axes.set(
            xlabel=f"GB per chip ({chip.name} has {chip.memory / 1e9:.0f}, dashed)",
            ylabel="seconds per step, estimated",
            xlim=(0, 1.35 * max(one.memory for one in estimates) / 1e9),
            ylim=(0, 1.25 * max(one.slowest for one in estimates)),
            title=f"{config.step_tokens:,} tokens per step on {config.topology}",
        )
        axes.legend(loc="lower left", fontsize=8)
        figure.tight_layout()
        figure.savefig(path)
        plt.close(figure)


def _of(model: str, estimates: Sequence[Estimate]) -> list[Estimate]:
    return [one for one in estimates if one.case.model == model]


def title(one: Estimate, others: Sequence[Estimate]) -> str:
    """Return the name of a case in tables: its layout, and any other option in which the cases differ.

    Args:
        one: The case.
        others: All cases of the run.
    """
    case = one.case
    words = [case.layout.replace("\n", ", ")]
    differ = lambda name: len({getattr(other.case, name) for other in others}) > 1
    if differ("model"):
        words.insert(0, case.model)
    if differ("length"):
        words.append(f"{case.length:,} tokens")
    if differ("remat"):
        words.append(f"remat {case.remat}")
    return ", ".join(words)


def _label(one: Estimate, config: Config) -> str:
    """Return the label of a case in the figure: its layout, and any other option in which the cases differ."""
    words = one.case.layout
    if len(config.remat) > 1:
        words += f", {one.case.remat}"
    return f"{words}\n{one.case.length:,} tokens" if len(config.length) > 1 else words
