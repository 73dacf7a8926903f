"""Configs as JSON, and files that are written whole or not at all."""

import dataclasses
import enum
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from effscale.atomic import atomic_file


def to_json(value: Any) -> Any:
    """Return a config (dataclasses, mappings, sequences, paths, enums, types, NumPy scalars) as plain JSON values.

    Two configs are the same run's if these are equal; what has no form in JSON is named by its ``repr`` or,
    for functions and classes, by its qualified name.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((to_json(item) for item in value), key=repr)
    if isinstance(value, enum.Enum):
        return to_json(value.value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, pathlib.PurePath):
        return str(value)
    if isinstance(value, np.dtype):
        return value.name
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value)


def differences(first: Any, second: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the fields, by dotted name, in which two JSON values differ.

    A field that one of them lacks and the other has as None is the same in both: most fields that were added later, to
    configs that had been saved without them, mean by None that all is as before.

    >>> differences({"model": {"layers": 2}, "seed": 0}, {"model": {"layers": 3}, "seed": 0})
    {'model.layers': (2, 3)}
    """
    if isinstance(first, dict) and isinstance(second, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted(first.keys() | second.keys()):
            name = f"{prefix}.{key}" if prefix else key
            values = first.get(key, "(absent)"), second.get(key, "(absent)")
            if None not in values or "(absent)" not in values:
                found |= differences(*values, name)
        return found
    return {} if first == second else {prefix: (first, second)}


def write_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file so that a reader, or a crash, finds the old content or the new one and nothing between."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """``value``, made plain by ``to_json``, as an indented JSON file, written atomically."""
    write_atomic(path, json.dumps(to_json(value), indent=2) + "\n")
