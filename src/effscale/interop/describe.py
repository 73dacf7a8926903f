"""The family that a config belongs to, and its ``config.json``: the way back from a model to transformers."""

import dataclasses
from typing import Any

from effscale.interop.families import FAMILIES, Family
from effscale.models import TransformerConfig

# How a model trains and computes, not what it is.
FREE = ("dtype", "remat", "init_std", "scale_residual_init", "groups")


def describe(config: TransformerConfig) -> tuple[Family, dict[str, Any]]:
    """The family whose config comes back the same from its ``config.json``, and the fields of that file.

    Dropout is written where the family has a name for it, and left out elsewhere.

    Raises:
        ValueError: If no family can express the config; the message says what keeps the nearest one from it.
    """
    near: list[tuple[int, str]] = []
    for family in FAMILIES.values():
        try:
            fields = family.to_hf(config)
            architecture = family.architecture(config.heads)
            back = family.from_hf({**family.defaults, **fields}, config.heads)
        except (ValueError, AssertionError, AttributeError):
            continue
        differences = _differences(_essence(config), _essence(back))
        if not differences:
            head = {"architectures": [architecture], "model_type": family.model_type}
            return family, head | fields
        near.append((len(differences), f"{family.model_type} differs in {', '.join(differences)}"))
    nearest = min(near)[1] if near else f"it has heads or parts that none of {list(FAMILIES)} has"
    raise ValueError(f"transformers has no family with this config: {nearest}")


def _essence(config: TransformerConfig) -> dict[str, Any]:
    """What has to agree: layer by layer, so that it does not matter how they are grouped."""
    layers = [
        block for group in config.groups for _ in range(group.repeat) for block in group.blocks
    ]
    plain = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in FREE
    }
    plain["layers"] = tuple(layers)
    return {name: _resolved(value, config) for name, value in plain.items()}


def _resolved(value: Any, config: TransformerConfig) -> Any:
    """A part without dropout, and with its defaults written out."""
    if isinstance(value, tuple):
        return tuple(_resolved(part, config) for part in value)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {f.name: _resolved(getattr(value, f.name), config) for f in dataclasses.fields(value)}
    fields.pop("dropout", None)
    if "num_kv_heads" in fields:
        width = value.width(config.d_model)
        fields |= {"num_kv_heads": value.kv_heads, "head_dim": width}
        fields["scale"] = width**-0.5 if value.scale is None else value.scale
        fields["out_bias"] = value.bias if value.out_bias is None else value.out_bias
    if type(value).__name__ == "Rotary" and value.dim is None:
        fields["dim"] = config.blocks[0].attention.width(config.d_model)
    if fields.get("d_embed") == config.d_model:
        fields["d_embed"] = None
    return type(value).__name__, tuple(sorted(fields.items(), key=lambda item: item[0]))


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return [name for name, value in ours.items() if value != theirs[name]]
