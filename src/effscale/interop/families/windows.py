"""The windows of a Qwen's layers in ``config.json``: one width, and which layers have it."""

from collections.abc import Callable
from typing import Any

from effscale.interop.families.fields import Json
from effscale.interop.foreign import Fields, shown
from effscale.interop.tensors import FolderError
from effscale.models import TransformerConfig

# The words of `layer_types`.
KINDS = {"full_attention": False, "sliding_attention": True}


def read(fields: Json, has_one: Callable[[int], bool]) -> tuple[int | None, ...] | None:
    """The window of each layer; None where no layer has one.

    Args:
        fields: Of ``config.json``.
        has_one: Which layers have one, where ``layer_types`` does not tell.
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
                f"config.json has layer_types={shown(kinds)}: must name one of {', '.join(KINDS)} for each of {len(have)} layers"
            )
        have = [KINDS[kind] for kind in kinds]
        if any(have) and not width:
            raise FolderError(
                "config.json has layer_types with sliding_attention, and with use_sliding_window="
                f"{fields['use_sliding_window']} and sliding_window={width} no window"
            )
    return tuple(width if one else None for one in have)


def write(config: TransformerConfig) -> dict[str, Any]:
    """The fields, from a config.

    Raises:
        ValueError: If layers have windows of different widths.
    """
    found = [layer.attention.window for layer in config.layers]
    widths = sorted({width for width in found if width is not None})
    if len(widths) > 1:
        raise ValueError(f"layers have windows of {widths} tokens, and a Qwen's have one width")
    full, sliding = KINDS
    fields: dict[str, Any] = {
        "use_sliding_window": bool(widths),
        "layer_types": [full if width is None else sliding for width in found],
    }
    return fields | ({"sliding_window": widths[0]} if widths else {})
