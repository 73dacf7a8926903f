"""Results of the experiment ``zeroquant``: figures, tables and plots."""

import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from effscale.experiments.zeroquant.arms import Arm
from effscale.study.table import deviation
from effscale.training.plotting import COLORS, STYLE, pyplot

PEERS = {
    "torch_float32": "float32, transformers",
    "torchao_w8a8": "W8A8, torchao int8-dynamic",
    "qwix_w8a8": "W8A8, qwix",
    "qwix_w4": "W4, tiles, qwix",
}


def language_figures(found: Mapping[str, Any]) -> dict[str, float]:
    """Return the named figures of the language model.

    Args:
        found: The mean loss of each row of each text, and the bytes of the layers, by arm.
    """
    figures = {}
    for name, arm in found.items():
        figures[f"smollm2_{name}_perplexity"] = perplexity(arm["wiki"])
        figures[f"smollm2_{name}_python_perplexity"] = perplexity(arm["python"])
        change, error = difference(arm["wiki"], found["float32"]["wiki"])
        figures[f"smollm2_{name}_loss_change"] = change
        figures[f"smollm2_{name}_loss_change_error"] = error
        if "bytes" in arm:
            figures[f"smollm2_{name}_layers_mb"] = arm["bytes"] / 1e6
    for without, with_it, name in (
        ("w4a8", "w4a8_lkd", "lkd_gap_closed"),
        ("w4a8", "w4a8_lkd_long", "lkd_long_gap_closed"),
        ("w4a8", "w4a8_lkd_random", "lkd_random_gap_closed"),
        ("w4", "w4_gptq", "gptq_gap_closed"),
        ("w4", "w4_gptq_normalized", "gptq_normalized_gap_closed"),
    ):
        if without not in found or with_it not in found:
            continue
        gap = figures[f"smollm2_{without}_loss_change"]
        figures[f"smollm2_{name}"] = 1 - figures[f"smollm2_{with_it}_loss_change"] / gap
    return figures


def sensitivity_figures(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the most sensitive layer and kind of weight of each recipe, and the added loss if only that part is quantized.

    Args:
        found: The loss that each part adds, by recipe and kind of part, such as ``w8a8_layer``.
    """
    figures: dict[str, float] = {}
    for name, parts in found.items():
        worst = max(parts, key=lambda part: parts[part])
        figures[f"smollm2_{name}_worst_loss_change"] = parts[worst]
        if name.endswith("_layer"):
            figures[f"smollm2_{name}_worst"] = int(worst.removeprefix("layers."))
    return figures


def perplexity(losses: Sequence[float]) -> float:
    """Return the perplexity of rows of equal length, from the mean loss of each."""
    return math.exp(np.mean(losses))


def difference(losses: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Return the mean difference of the losses over rows, and its standard error."""
    found = np.array(losses) - np.array(base)
    return float(found.mean()), deviation(found) / math.sqrt(len(found))


def language_rows(found: Mapping[str, Any], arms: Mapping[str, Arm]) -> list[list[str]]:
    """Return a heading and one row per arm and peer."""
    figures = language_figures(found)
    rows = [
        [
            "weights and inputs",
            "layers, MB",
            "added loss",
            "perplexity",
            "change",
            "perplexity on Python",
        ]
    ]
    titles = {name: arm.title for name, arm in arms.items()} | PEERS
    for name, arm in found.items():
        get = lambda what, name=name: figures[f"smollm2_{name}_{what}"]
        size = f"{get('layers_mb'):.1f}" if "bytes" in arm else ""
        change = f"{get('loss_change'):+.4f} ± {get('loss_change_error'):.4f}"
        rows.append(
            [titles[name], size, change, f"{get('perplexity'):.2f}",
             f"{math.expm1(get('loss_change')):+.1%}", f"{get('python_perplexity'):.2f}"]
        )  # fmt: skip
    return rows


def classifier_figures(found: Sequence[Mapping[str, Any]], majority: float) -> dict[str, float]:
    """Return the named figures of the classifier.

    Args:
        found: The accuracy and the bytes of the layers by arm, for each seed.
        majority: Accuracy of the most frequent label.
    """
    figures = {"minilm_majority": majority}
    for name in found[0]:
        values, base = accuracies(found, name), accuracies(found, "float32")
        figures[f"minilm_{name}_accuracy"] = float(values.mean())
        figures[f"minilm_{name}_accuracy_std"] = deviation(values)
        figures[f"minilm_{name}_accuracy_change"] = float((values - base).mean())
        figures[f"minilm_{name}_layers_mb"] = found[0][name]["bytes"] / 1e6
    return figures


def accuracies(found: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """Return the accuracy of an arm for each seed."""
    return np.array([seed[name]["accuracy"] for seed in found])


def classifier_rows(found: Sequence[Mapping[str, Any]], arms: Mapping[str, Arm]) -> list[list[str]]:
    """Return a heading and one row per arm: the accuracy of each seed and the mean, in percent, and the change from float32 in points."""
    seeds = [f"seed {seed}" for seed in range(len(found))]
    rows = [["weights and inputs", "layers, MB", *seeds, "mean", "change"]]
    base = accuracies(found, "float32")
    for name in found[0]:
        values = accuracies(found, name)
        size = f"{found[0][name]['bytes'] / 1e6:.1f}"
        change = f"{100 * (values - base).mean():+.2f}"
        numbers = [*(f"{100 * value:.1f}" for value in values), f"{100 * values.mean():.2f}"]
        rows.append([arms[name].title, size, *numbers, change])
    return rows


def draw_language(
    path: pathlib.Path, figures: Mapping[str, float], arms: Mapping[str, Arm]
) -> None:
    """Draw how much each arm adds to the loss, with the standard error of the mean over rows.

    Args:
        path: The PNG to write.
        figures: The result of `language_figures`; the figures of a committed ``results.json`` work as well.
        arms: The arms, for their titles.
    """
    plt = pyplot()
    titles = {name: arm.title for name, arm in arms.items()} | PEERS
    measured = [name for name in titles if f"smollm2_{name}_loss_change" in figures]
    names = [name for name in measured if name not in ("float32", "torch_float32")][::-1]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.5, 0.28 * len(names) + 1.0), dpi=100)
        for ours, color, label in ((True, COLORS[0], "effscale"), (False, COLORS[1], "others")):
            shown = [place for place, name in enumerate(names) if (name not in PEERS) == ours]
            changes = [figures[f"smollm2_{names[place]}_loss_change"] for place in shown]
            errors = [figures[f"smollm2_{names[place]}_loss_change_error"] for place in shown]
            if shown:
                axes.barh(shown, changes, xerr=errors, color=color, height=0.7, label=label)
            for place, change, error in zip(shown, changes, errors, strict=True):
                at = max(change, 0.0) + error + 0.01
                axes.text(at, place, f"{change:+.3f}", va="center", fontsize=8)
        axes.set_yticks(range(len(names)), [titles[name] for name in names])
        axes.set_xlabel("loss added to float32 (nats per token)")
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.1)
        axes.legend(loc="lower right")
        figure.tight_layout()
        figure.savefig(path)
        plt.close(figure)


def draw_sensitivity(path: pathlib.Path, found: Mapping[str, Mapping[str, float]]) -> None:
    """Draw the loss that quantizing a single layer, or a single kind of weight, adds.

    Args:
        path: The PNG to write.
        found: The loss that each part adds, by recipe and kind of part, such as ``w8a8_layer``.
    """
    plt = pyplot()
    titles = {"w8a8": "W8A8", "w4a8": "W4/8A8"}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(9.0, 5.4), dpi=100, width_ratios=(2, 1))
        for row, (recipe, title) in enumerate(titles.items()):
            for column, by in enumerate(("layer", "kind")):
                parts = found[f"{recipe}_{by}"]
                place = axes[row][column]
                labels = [re.sub(r"^layers\.|\.kernel$", "", name) for name in parts]
                if by == "layer":
                    place.bar(
                        [int(label) for label in labels], list(parts.values()), color=COLORS[row]
                    )
                    place.set(
                        title=title,
                        xlabel="the only layer that is quantized",
                        ylabel="added loss (nats per token)",
                    )
                else:
                    place.barh(labels[::-1], list(parts.values())[::-1], color=COLORS[row])
                    place.set(
                        title="one kind of weight",
                        xlabel="added loss (nats per token)",
                    )
        figure.tight_layout()
        figure.savefig(path)
        plt.close(figure)
