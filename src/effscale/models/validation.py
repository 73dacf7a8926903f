"""Validation of configs and of JSON from other projects: each error names the field, its value and what is valid."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from effscale.options import _near, check, did_you_mean, is_finite, is_integer  # noqa: F401


def choice(config: Any, field: str, names: Iterable[str]) -> None:
    """Raise a ValueError that suggests similar names unless the field's value is one of ``names``."""
    value, names = getattr(config, field), tuple(names)
    if value not in names:
        near = _near(str(value), names)
        raise ValueError(
            f"{type(config).__name__}.{field} must be one of {', '.join(map(repr, names))}, got {value!r}"
            + (f"; {near}" if near else "")
        )


def check_finite(config: Any) -> None:
    """Raise a ValueError that names the field if a number of a dataclass is NaN or infinite."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        values = value if isinstance(value, tuple) else (value,)
        finite = all(math.isfinite(x) for x in values if isinstance(x, float))
        check(config, finite, field.name, "finite")


def check_keys(
    block: Any, where: str, *, required: Iterable[str] = (), optional: Iterable[str] = ()
) -> None:
    """Raise a ValueError unless ``block``, from JSON, is an object with all required keys and no unknown keys."""
    if not isinstance(block, Mapping):
        raise ValueError(f"{where} must be an object of keys and values, got {block!r}")
    known = [*required, *optional]
    for key in block:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}: {did_you_mean(str(key), known)}")
    if missing := [key for key in required if key not in block]:
        raise ValueError(f"{where}: needs {', '.join(missing)}")


def switch(block: Any, where: str) -> bool:
    """Return whether a block of JSON is ``enabled``; the key is required."""
    check_keys(block, where, required=("enabled",), optional=block)
    if not isinstance(block["enabled"], bool):
        raise ValueError(f"{where}.enabled must be true or false, got {block['enabled']!r}")
    return block["enabled"]


def whole_number(value: Any, where: str) -> int:
    """Return a whole number from JSON, which does not distinguish integers from other numbers: 1e5 is read as a float."""
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not is_whole:
        raise ValueError(f"{where} must be a whole number, got {value!r}")
    return int(value)


def whole_numbers(value: Any, where: str) -> tuple[int, ...]:
    """Return a list of whole numbers."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where} must be a list, got {value!r}")
    return tuple(whole_number(one, where) for one in value)
