"""The ways in which the experiment ``zeroquant`` quantizes a model."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from effscale.models import Transformer
from effscale.quant import (
    LKD,
    Format,
    Recipe,
    Rule,
    distill_layers,
    fake_quantize_model,
    input_grams,
    input_ranges,
    quantize_model,
    w4a8,
    w4a16,
    w8a8,
)

Method = Literal["round", "static", "gptq", "gptq_normalized", "lkd", "lkd_long", "lkd_random"]


class Arm(NamedTuple):
    """A recipe and a method to find the codes; without a recipe the model is not quantized."""

    title: str
    recipe: Recipe | None
    method: Method = "round"


LAYERS = r"layers\..*kernel"


def make_arms(group_size: int) -> dict[str, Arm]:
    """Return all arms by name."""
    per_tensor = Format(granularity="tensor")
    all_alike = lambda weights, inputs=None: Recipe(
        (Rule(where=LAYERS, weights=weights, activations=inputs),)
    )
    groups = Format(bits=4, granularity="group", group_size=group_size)
    coarse, mixed, mixed_16 = w4a8(), w4a8(group_size), w4a16(group_size)
    by = f"groups of {group_size}"
    symmetric = Format(granularity="token")
    return {
        "float32": Arm("float32", None),
        "w8a8_per_tensor": Arm("W8A8, one scale per matrix", all_alike(per_tensor, per_tensor), "static"),
        "w8a8": Arm("W8A8, ZeroQuant", w8a8()),
        "w8a8_symmetric": Arm("W8A8, symmetric inputs", all_alike(Format(), symmetric)),
        "w8a16": Arm("W8A16", all_alike(Format())),
        "w4a16": Arm(f"W4/8A16, {by}", mixed_16),
        "w4a8": Arm(f"W4/8A8, {by}", mixed),
        "w4a8_lkd": Arm(f"W4/8A8, {by}, LKD", mixed, "lkd"),
        "w4a8_lkd_long": Arm(f"W4/8A8, {by}, LKD, twice the steps", mixed, "lkd_long"),
        "w4a8_lkd_random": Arm(f"W4/8A8, {by}, LKD on random tokens", mixed, "lkd_random"),
        "w4a8_gptq": Arm(f"W4/8A8, {by}, GPTQ", mixed, "gptq"),
        "w4a8_gptq_normalized": Arm(f"W4/8A8, {by}, GPTQ, equal tokens", mixed, "gptq_normalized"),
        "w4a8_channel": Arm("W4/8A8, one scale per output", coarse),
        "w4": Arm(f"W4, {by}", all_alike(groups)),
        "w4_gptq": Arm(f"W4, {by}, GPTQ", all_alike(groups), "gptq"),
        "w4_gptq_normalized": Arm(f"W4, {by}, GPTQ, equal tokens", all_alike(groups), "gptq_normalized"),
    }  # fmt: skip


class Calibration(NamedTuple):
    """Calibration data of the methods: batches of text, and batches of random tokens of the same shape."""

    text: Sequence[Mapping[str, Any]]
    random: Sequence[Mapping[str, Any]]


def quantized(
    model: Transformer, arm: Arm, calibration: Callable[[], Calibration], lkd: LKD
) -> Transformer:
    """Quantize a model according to an arm.

    Args:
        model: The float model.
        arm: The arm.
        calibration: Returns calibration data, for the methods that need it.
        lkd: Options of layer-by-layer distillation.
    """
    if arm.recipe is None:
        return model
    if arm.method == "static":
        return quantize_model(model, arm.recipe, ranges=input_ranges(model, calibration().text))
    if arm.method in ("gptq", "gptq_normalized"):
        normalize = arm.method == "gptq_normalized"
        grams = input_grams(model, calibration().text, normalize=normalize)
        return quantize_model(model, arm.recipe, grams=grams)
    if arm.method in ("lkd", "lkd_long", "lkd_random"):
        if arm.method == "lkd_long":
            lkd = dataclasses.replace(lkd, steps=2 * lkd.steps)
        random = arm.method == "lkd_random"
        batches = calibration().random if random else calibration().text
        student = fake_quantize_model(model, arm.recipe)
        model = distill_layers(model, student, batches, lkd).model
    return quantize_model(model, arm.recipe)
