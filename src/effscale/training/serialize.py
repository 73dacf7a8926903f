"""Configs as JSON, and atomic writes of files."""

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

    Two configs belong to the same run if their results are equal. What has no JSON form is represented by its ``repr`` or,
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

    A field that is missing in one and None in the other counts as equal: for most fields that are added to a config later,
    None means that nothing changes.

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
    """Write a text file so that a reader finds either the old or the new content, even after a crash."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value``, converted by ``to_json``, atomically as an indented JSON file."""
    write_atomic(path, json.dumps(to_json(value), indent=2) + "\n")
