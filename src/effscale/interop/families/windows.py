"""The windows of a Qwen model's layers in ``config.json``: one width, and which layers use it."""

from collections.abc import Callable
from typing import Any

from effscale.interop.families.fields import Json
from effscale.interop.foreign import Fields, shown
from effscale.interop.tensors import FolderError
from effscale.models import TransformerConfig

# The values of `layer_types`.
KINDS = {"full_attention": False, "sliding_attention": True}


def read(fields: Json, has_one: Callable[[int], bool]) -> tuple[int | None, ...] | None:
    """Return the window of each layer, or None if no layer has one.

    Args:
        fields: The fields of ``config.json``.
        has_one: Which layers have a window if ``layer_types`` is absent.
    """
    typed = Fields("config.json", fields)
    width = typed.whole("sliding_window", None, least=0) if fields["use_sliding_window"] else None
    kinds = typed.strings("layer_types", None)
    if kinds is None and not width:
        return None
    have = [has_one(layer) for layer in range(fields["num_hidden_layers"])]
    if kinds is not None:
        if len(kinds) != len(have) or not set(kinds) <= set(KINDS):
            raise FolderError(
                f"config.json: layer_types must name one of {', '.join(KINDS)} for each of {len(have)} layers, got {shown(kinds)}"
            )
        have = [KINDS[kind] for kind in kinds]
        if any(have) and not width:
            raise FolderError(
                "config.json: layer_types has sliding_attention, but use_sliding_window="
                f"{fields['use_sliding_window']} and sliding_window={width} define no window"
            )
    return tuple(width if one else None for one in have)


def write(config: TransformerConfig) -> dict[str, Any]:
    """Return the fields for a config.

    Raises:
        ValueError: Layers have windows of different widths.
    """
    found = [layer.attention.window for layer in config.layers]
    widths = sorted({width for width in found if width is not None})
    if len(widths) > 1:
        raise ValueError(
            f"the windows of all layers must have the same width in a Qwen model, got {widths}"
        )
    full, sliding = KINDS
    fields: dict[str, Any] = {
        "use_sliding_window": bool(widths),
        "layer_types": [full if width is None else sliding for width in found],
    }
    return fields | ({"sliding_window": widths[0]} if widths else {})
