"""Write packed weights in the layout of compressed-tensors; see ``effscale.interop.compressed_tensors.reader``."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from effscale.interop.compressed_tensors.config import (
    INT,
    PACKED,
    Scheme,
    config_fields,
    scheme_for,
    target_of_layers,
)
from effscale.interop.compressed_tensors.reader import to_words
from effscale.interop.packed.coded import kernel_codes, kernel_scales
from effscale.interop.plan import values_of
from effscale.interop.save import StoredSlot, ToTheirs, stored_slots
from effscale.models import Transformer
from effscale.quant.packed import PackedWeight

EXACT = 1e-4
"""How far a zero point may be from an integer multiple of the scale, relative to the scale; float32 rounding stays
below this."""


class CompressedStore:
    """Writer of a model's packed weights; see ``effscale.interop.save.Store``.

    Attributes:
        fields: The ``quantization_config``.
        metadata: Metadata for the header of each file: empty.

    Raises:
        ValueError: This layout cannot hold a weight; the error names it.
    """

    def __init__(self, model: Transformer):
        values = values_of(model)
        self._schemes: dict[str, Scheme] = {}
        rows: dict[Any, dict[StoredSlot, Scheme | None]] = {}
        for place in stored_slots(model):
            weights = [values[leaf] for leaf in place.slot.leaves]
            scheme = None
            if any(isinstance(weight, PackedWeight) for weight in weights):
                scheme = self._schemes[place.name] = _scheme_of(place, weights)
            rows.setdefault(place.slot.rule, {})[place] = scheme
        if self._schemes:
            _check_experts(
                {place: scheme for row in rows.values() for place, scheme in row.items()}
            )
        self.fields: dict[str, Any] = config_fields(_targets(rows))
        self.metadata: dict[str, str] = {}

    def __call__(
        self, place: StoredSlot, weights: tuple[Any, ...], to_theirs: ToTheirs
    ) -> Iterator[tuple[str, np.ndarray]] | None:
        """Yield the tensors of a packed weight."""
        scheme = self._schemes.get(place.name)
        return None if scheme is None else _tensors(place.name, scheme, weights, to_theirs)


def _tensors(
    name: str, scheme: Scheme, weights: tuple[PackedWeight, ...], to_theirs: ToTheirs
) -> Iterator[tuple[str, np.ndarray]]:
    module, bits = name.removesuffix(".weight"), scheme.weights.bits
    codes = np.ascontiguousarray(to_theirs([kernel_codes(weight) for weight in weights]))
    scale = to_theirs([kernel_scales(weight, weight.scale) for weight in weights])
    if scheme.layout == INT:
        yield name, codes
    else:
        yield f"{module}.weight_packed", to_words(codes, bits)
        yield f"{module}.weight_shape", np.array(codes.shape, np.int64)
    yield f"{module}.weight_scale", np.ascontiguousarray(scale)
    if not scheme.weights.symmetric:
        zero = to_theirs([kernel_scales(weight, weight.zero) for weight in weights])
        points = _whole_zero_points(name, -zero / scale, bits)
        if scheme.layout == PACKED:
            points = to_words(np.ascontiguousarray(points.T), bits).T
        yield f"{module}.weight_zero_point", np.ascontiguousarray(points)


def _whole_zero_points(name: str, points: np.ndarray, bits: int) -> np.ndarray:
    rounded, half = np.round(points), 1 << (bits - 1)
    if not (np.abs(points - rounded) < EXACT).all():
        raise ValueError(
            f"{name}: its zero points are not integer multiples of the scales (integer_zero=False, as in GGUF's Q4_1), which "
            "compressed-tensors requires. Save with layout='effscale', or quantize with integer_zero=True"
        )
    if rounded.min() < -half or rounded.max() >= half:
        raise ValueError(
            f"{name}: a zero point does not fit into {bits} bits, because 0 is far from the range of its group. Save with layout='effscale'"
        )
    return rounded.astype(np.int8)


def _check_experts(schemes: Mapping[StoredSlot, Scheme | None]) -> None:
    """Raise if other programs cannot load a mixture: they merge its experts, which have one scheme without zero points or inputs."""
    experts = {place: scheme for place, scheme in schemes.items() if len(place.slot.index) > 1}
    first = next(iter(experts.values()), None)
    for place, scheme in experts.items():
        if scheme is None:
            what = "is not packed, while other weights are"
        elif scheme.layout != PACKED or scheme.activations is not None:
            what = "has quantized inputs"
        elif not scheme.weights.symmetric:
            what = "has zero points"
        elif scheme != first:
            what = "has another format than other experts"
        else:
            continue
        raise ValueError(
            f"{place.name} {what}. In compressed-tensors' layout all experts need the same symmetric format and unquantized "
            "inputs, as in w4a16(); otherwise transformers cannot load them. Save with layout='effscale', or change the recipe"
        )


def _scheme_of(place: StoredSlot, weights: list[Any]) -> Scheme:
    """Return the scheme of a tensor that holds packed weights."""
    slot = place.slot
    other = "compressed-tensors quantizes only torch.nn.Linear. Save with layout='effscale', or call dequantize_model"
    if slot.leaves[0].endswith("embedding"):
        raise ValueError(f"{place.name} is an embedding table, and {other}")
    if slot.leaves[0].endswith("router.logits.kernel"):
        raise ValueError(
            f"{place.name} is a router, which transformers reads only as floats. Leave it out of the recipe, or save with layout='effscale'"
        )
    layout = slot.rule.layout or ""
    if not re.fullmatch(r"(\w+|\([\w ]+\)) i -> .*", layout):
        raise ValueError(
            f"{place.name} is not a torch.nn.Linear in transformers (in GPT-2 it is a Conv1D), and {other}"
        )
    formats = {
        (weight.format, weight.activations) if isinstance(weight, PackedWeight) else None
        for weight in weights
    }
    if len(formats) > 1:
        raise ValueError(
            f"{place.name} holds {', '.join(slot.rule.parts)} as one tensor, but their formats differ. Quantize them with the "
            "same rule, or save with layout='effscale'"
        )
    packed: PackedWeight = weights[0]
    if packed.input_scale is not None:
        raise ValueError(
            f"{place.name}: its inputs have a fixed scale (ranges), which compressed-tensors cannot hold. Save with layout='effscale'"
        )
    try:
        return scheme_for(packed.format, packed.activations)
    except ValueError as error:
        raise ValueError(f"{place.name}: {error}. Save with layout='effscale'") from error


def _targets(rows: Mapping[Any, Mapping[StoredSlot, Scheme | None]]) -> dict[Scheme, list[str]]:
    """Return the modules of each scheme; modules of all layers become one pattern if they have the same scheme."""
    groups: dict[Scheme, list[str]] = {}
    for places in rows.values():
        alike = len(set(places.values())) == 1
        for place, scheme in places.items():
            if scheme is None:
                continue
            targets = groups.setdefault(scheme, [])
            # compressed-tensors goes by the names in memory, which may differ from those in files.
            for name in (place.memory_name, place.name):
                module = name.removesuffix(".weight")
                target = (
                    target_of_layers(module) if alike and place.slot.layer is not None else module
                )
                if target not in targets:
                    targets.append(target)
    return groups
