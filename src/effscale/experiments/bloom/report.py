"""Results: zero-shot accuracies before and after fine-tuning, and the loss and fertility by language."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np

from effscale.experiments.bloom.corpus import Prepared
from effscale.experiments.bloom.tasks import Group
from effscale.study.table import deviation
from effscale.training import read_jsonl
from effscale.training.plotting import COLORS, STYLE, pyplot, series, smooth

STAGES = ("zero_shot_before", "zero_shot_after")
GROUPS: tuple[Group, ...] = get_args(Group)
Found = Mapping[str, Any]
LANGUAGES = {
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "de": "German",
    "id": "Indonesian",
    "ru": "Russian",
    "it": "Italian",
    "pt-BR": "Portuguese",
    "ca": "Catalan",
    "zh-Hans": "Chinese",
}
"""Names of languages in tables and figures; other codes are shown unchanged."""


def read(place: pathlib.Path) -> dict[str, Found]:
    """Read the evaluations of a seed's models, and which checkpoint fine-tuning selected."""
    read_one = lambda *names: json.loads(place.joinpath(*names).read_text(encoding="utf-8"))
    found = {name: read_one(name, "found.json") for name in STAGES}
    return found | {"chosen": read_one("finetune", "chosen.json")}


def accuracy(found: Found, *, figure: str = "median", **where: str) -> float:
    """Return the accuracy: the mean over cells of the median over templates.

    Args:
        found: The evaluation of one model.
        figure: ``median``, or ``chance`` for the accuracy of guessing.
        where: Use only cells with this ``task``, ``language`` or ``group``. Without a group, cells that fine-tuning has seen are left
            out.
    """
    cells = [
        cell[figure]
        for cell in found["accuracy"]
        if all(cell[key] == value for key, value in where.items())
        and ("group" in where or cell["group"] != "learned")
    ]
    return float(np.mean(cells)) if cells else float("nan")


def figures(
    seeds: Sequence[Mapping[str, Found]], prepared: Prepared
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return the named figures, as means over seeds and for each seed."""
    before, after = ([seed[stage] for seed in seeds] for stage in STAGES)
    each: dict[str, list[float]] = {
        "val_loss": [found["val_loss"]["all"] for found in before],
        "val_loss_after": [found["val_loss"]["all"] for found in after],
        "zero_shot_before": [accuracy(found) for found in before],
        "zero_shot_after": [accuracy(found) for found in after],
        "chance": [accuracy(found, figure="chance") for found in before],
        "chosen_step": [float(seed["chosen"]["step"]) for seed in seeds],
    }
    tasks = dict.fromkeys(cell["task"] for cell in before[0]["accuracy"])
    for group in GROUPS:
        wheres: dict[str, dict[str, str]] = {"": {"group": group}}
        wheres |= {f"{task}_": {"group": group, "task": task} for task in tasks}
        kinds = (
            ("before", before, "median"),
            ("after", after, "median"),
            ("chance", before, "chance"),
        )
        for prefix, where in wheres.items():
            for kind, found, figure in kinds:
                values = [accuracy(one, figure=figure, **where) for one in found]
                if np.isfinite(values).all():
                    each[f"{prefix}{group.replace(' ', '_')}_{kind}"] = values
    named = {name: float(np.mean(values)) for name, values in each.items()}
    named |= {"fertility_ratio_max": max(_ratios(prepared).values())}
    return named, each


def _ratios(prepared: Prepared) -> dict[str, float]:
    return {
        name: prepared.fertility[name] / prepared.fertility_alone[name] for name in prepared.corpora
    }


def tables(seeds: Sequence[Mapping[str, Found]], prepared: Prepared) -> dict[str, list[list[str]]]:
    """Return the tables for the terminal and the page."""
    cells = seeds[0]["zero_shot_before"]["accuracy"]
    names = lambda key: list(dict.fromkeys(cell[key] for cell in cells))
    words: dict[Group, str] = {
        "learned": "learned, in the languages of fine-tuning",
        "new language": "learned, in new languages",
        "new task": "not learned, in all languages",
    }
    groups = {words[group]: {"group": group} for group in GROUPS}
    tasks = {
        f"{task}: {words[group]}": {"task": task, "group": group}
        for task in names("task")
        for group in GROUPS
    }
    languages = {
        LANGUAGES.get(language, language): {"language": language} for language in names("language")
    }
    return {
        "Accuracy before and after fine-tuning (± standard deviation over seeds)": _rows(
            seeds, groups
        ),
        "Accuracy by task": _rows(seeds, tasks),
        "Accuracy by language, over the pairs of task and language that fine-tuning did not see": _rows(
            seeds, languages
        ),
        "The corpus": _corpus(prepared),
        "Tokens per word in held-out text, with the shared tokenizer and with one of the language only, and the loss on that text in "
        "nats per token before and after fine-tuning": _by_component(seeds, prepared),
    }


def _rows(
    seeds: Sequence[Mapping[str, Found]], wheres: Mapping[str, Mapping[str, str]]
) -> list[list[str]]:
    """Return a heading and one row for each selection of cells that is not empty."""
    rows = [["tasks", "chance", "before", "after"]]
    for name, where in wheres.items():
        chance = accuracy(seeds[0][STAGES[0]], figure="chance", **where)
        if np.isfinite(chance):
            both = [_spread([accuracy(seed[stage], **where) for seed in seeds]) for stage in STAGES]
            rows.append([name, f"{100 * chance:.0f} %", *both])
    return rows


def _spread(values: Sequence[float]) -> str:
    shares = 100 * np.array(values)
    return f"{shares.mean():.1f} ± {deviation(shares):.1f} %"


def _corpus(prepared: Prepared) -> list[list[str]]:
    rows = [["text", "documents", "bytes", "tokens", "weight"]]
    for name, corpus in prepared.corpora.items():
        stores = (corpus.train, corpus.validation)
        rows.append(
            [
                LANGUAGES.get(name, name),
                f"{sum(store.num_documents for store in stores):,}",
                f"{corpus.num_bytes:,}",
                f"{sum(store.num_tokens for store in stores):,}",
                f"{prepared.weights[name]:.3f}",
            ]
        )
    return rows


def _by_component(seeds: Sequence[Mapping[str, Found]], prepared: Prepared) -> list[list[str]]:
    rows = [["text", "tokens per word", "own tokenizer", "ratio", "loss before", "loss after"]]
    ratios = _ratios(prepared)
    for name in prepared.corpora:
        losses = [np.mean([seed[stage]["val_loss"][name] for seed in seeds]) for stage in STAGES]
        cut = (prepared.fertility[name], prepared.fertility_alone[name], ratios[name])
        rows.append(
            [
                LANGUAGES.get(name, name),
                *(f"{x:.2f}" for x in cut),
                *(f"{loss:.2f}" for loss in losses),
            ]
        )
    return rows


def draw(path: pathlib.Path, folder: pathlib.Path, seeds: Sequence[Mapping[str, Found]]) -> None:
    """Draw the loss during pretraining (mean and range over seeds), and the accuracies before and after fine-tuning by language."""
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, 2, figsize=(9.6, 3.6), gridspec_kw={"width_ratios": (1, 1.3)}
        )
        files = [folder / f"seed-{n}" / "pretrain" / "metrics.jsonl" for n in range(len(seeds))]
        records = [read_jsonl(file) for file in files]
        tokens = series(records[0], "loss", "tokens")[0]
        losses = np.stack([smooth(series(each, "loss")[1], 20) for each in records])
        axes[0].plot(tokens / 1e6, losses.mean(0), color=COLORS[0], label="training loss")
        axes[0].fill_between(tokens / 1e6, losses.min(0), losses.max(0), color=COLORS[0], alpha=0.2)
        axes[0].set(xlabel="tokens (millions)", ylabel="loss (nats per token)", title="Pretraining")
        cells = [c for c in seeds[0]["zero_shot_before"]["accuracy"] if c["group"] != "learned"]
        names = list(dict.fromkeys(cell["language"] for cell in cells))
        for shift, stage, color, label in (
            (-0.2, "zero_shot_before", COLORS[-1], "before fine-tuning"),
            (0.2, "zero_shot_after", COLORS[1], "after"),
        ):
            values = np.array(
                [[accuracy(seed[stage], language=name) for name in names] for seed in seeds]
            )
            spread = np.abs(np.stack([values.min(0), values.max(0)]) - values.mean(0))
            at = np.arange(len(names)) + shift
            axes[1].bar(at, 100 * values.mean(0), 0.38, color=color, alpha=0.8, label=label)
            axes[1].errorbar(
                at, 100 * values.mean(0), 100 * spread, fmt="none", ecolor="black", linewidth=1
            )
        for at, name in enumerate(names):
            chance = np.mean([cell["chance"] for cell in cells if cell["language"] == name])
            label = "chance" if at == 0 else None
            axes[1].hlines(
                100 * chance, at - 0.45, at + 0.45, color=COLORS[2], linestyle="--", label=label
            )
        shown = [LANGUAGES.get(name, name) for name in names]
        axes[1].set_xticks(range(len(names)), shown, rotation=35, ha="right")
        axes[1].set(
            ylabel="zero-shot accuracy (%)",
            title="Pairs of task and language not seen in fine-tuning",
            ylim=(0, 80),
        )
        axes[1].legend(fontsize=8, ncols=3, loc="upper center")
        figure.tight_layout()
        figure.savefig(path)
        plt.close(figure)
