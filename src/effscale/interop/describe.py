"""Find the family of a config and its ``config.json``: the conversion from effscale back to transformers."""

import dataclasses
import re
from typing import Any

import numpy as np

from effscale.interop.families import FAMILIES
from effscale.interop.families.family import Family, Heads
from effscale.interop.tensors import TensorInfo
from effscale.models import ClassHead, TransformerConfig

# Maximum number of differences in an error.
SHOWN = 5
# Fields that affect how a model trains and computes, but not what it is.
FREE = ("dtype", "remat", "attention_implementation", "init_std", "scale_residual_init", "groups")


def describe(config: TransformerConfig, prefer: str | None = None) -> tuple[Family, dict[str, Any]]:
    """Return a family that can express the config in its ``config.json``, and the fields of that file.

    Dropout is written if the family has a name for it, and left out otherwise.

    Args:
        config: The model's config.
        prefer: The ``model_type`` to try first: a Mistral without windows is also a Llama.

    Raises:
        ValueError: No family can express the config; the message explains what the closest one lacks.
    """
    kinds = {type(block.feed_forward) for block in config.blocks}
    near: list[tuple[int, bool, str]] = []
    known: set[type] = set()
    for model_type in sorted(FAMILIES, key=lambda model_type: model_type != prefer):
        family = FAMILIES[model_type]
        known |= set(family.feed_forwards)
        architecture, differences = None, []
        try:
            architecture = family.architecture(config.heads)
        except ValueError as error:
            differences.append(str(error))
        try:
            fields = family.to_hf(config)
            every = {**family.defaults, **fields, "architectures": [architecture]}
            named = _as_in_files(config)
            heads = named.heads if architecture is None else _heads_found(family, every, named)
            back = family.from_hf(every, heads)
        except ValueError:
            continue
        ours, theirs = (essence(family.plain(one)) for one in (named, back))
        differences += _differences(ours, theirs, family.model_type)
        if not differences:
            head = {"architectures": [architecture], "model_type": family.model_type}
            return family, head | fields
        more = f" and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        has_class = architecture is not None
        near.append((len(differences), has_class, "; ".join(differences[:SHOWN]) + more))
    for kind in kinds - known:
        raise ValueError(f"transformers has no family with the feed-forward {kind.__name__}")
    nearest = min(near)[2] if near else f"it has parts that none of {', '.join(FAMILIES)} supports"
    raise ValueError(f"transformers has no family with this config: {nearest}")


def _as_in_files(config: TransformerConfig) -> TransformerConfig:
    """Return the config with a score head renamed to classes, from which a file cannot distinguish it."""
    heads = tuple(
        dataclasses.replace(head, name="classes")
        if isinstance(head, ClassHead) and head.name == "score"
        else head
        for head in config.heads
    )
    alone = len({head.name for head in heads}) == len(heads)
    return dataclasses.replace(config, heads=heads) if alone else config


def _heads_found(family: Family, fields: dict[str, Any], config: TransformerConfig) -> Heads:
    """Return the heads that the loader would find, from the names and shapes of their tensors."""
    heads = {head.name: head for head in config.heads}
    tensors: dict[str, TensorInfo] = {}
    for rule in family.heads:
        _, name, *_, kind = rule.parts[0].split(".")
        if name in heads and (kind != "bias" or getattr(heads[name], "bias", False)):
            shape = (getattr(heads[name], "num_classes", 1), 1)
            tensors[rule.theirs] = TensorInfo(shape, np.dtype("float32"))
    if config.pooler:
        tensors["pooler.dense.weight"] = TensorInfo((1, 1), np.dtype("float32"))
    return family.find_heads(fields, tensors)


def essence(config: TransformerConfig) -> dict[str, Any]:
    """Return what determines a model's outputs, by path and layer by layer, so that grouping does not matter."""
    found: dict[str, Any] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, tuple):
            found[f"{path}.num"] = len(value)
            for index, part in enumerate(value):
                walk(f"{path}.{index}", part)
        elif dataclasses.is_dataclass(value):
            found[path] = type(value).__name__
            for name, part in _resolved(value, config).items():
                walk(f"{path}.{name}", part)
        else:
            found[path] = value

    for field in dataclasses.fields(config):
        if field.name not in FREE:
            walk(field.name, getattr(config, field.name))
    walk("layers", config.layers)
    return found


def _resolved(part: Any, config: TransformerConfig) -> dict[str, Any]:
    """Return the fields of a part, without dropout and with explicit defaults."""
    fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    fields.pop("dropout", None)
    if "transform" in fields and part.transform is None:
        del fields["norm"]  # the norm of the transform
    if "num_kv_heads" in fields:
        width = part.width(config.d_model)
        fields |= {"num_kv_heads": part.kv_heads, "head_dim": width}
        fields["scale"] = width**-0.5 if part.scale is None else part.scale
        fields["out_bias"] = part.bias if part.out_bias is None else part.out_bias
    if type(part).__name__ == "Rotary" and part.dim is None:
        fields["dim"] = config.blocks[0].attention.width(config.d_model)
    if fields.get("d_embed") == config.d_model:
        fields["d_embed"] = None
    return fields


def _differences(ours: dict[str, Any], theirs: dict[str, Any], family: str) -> list[str]:
    """Describe the differences between two essences, once for all layers."""
    said: dict[str, str] = {}
    for path in [*ours, *(path for path in theirs if path not in ours)]:
        mine, other = ours.get(path), theirs.get(path)
        parent, _, _ = path.rpartition(".")
        # If the parts are of different kinds, their fields do not matter.
        if mine != other and ours.get(parent) == theirs.get(parent):
            where = re.sub(r"^layers\.\d+\.", "layers.", path)
            said.setdefault(where, f"{where} is {mine!r}, and {family} has {other!r}")
    return list(said.values())
