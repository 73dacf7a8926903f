"""Errors of configs and of JSON from elsewhere: each names the field, its value, and what would do."""

import dataclasses
import difflib
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any


def check(config: Any, holds: bool, field: str, wanted: str) -> None:
    """Raises a ValueError that names ``field`` and its value unless ``holds``."""
    if not holds:
        raise ValueError(
            f"{type(config).__name__}.{field}={getattr(config, field)!r}: must be {wanted}"
        )


def is_finite(value: Any) -> bool:
    """Whether a value is a finite real number, of Python or NumPy, that a float can hold; a bool is none.

    Example:
        >>> is_finite(3), is_finite(float("inf")), is_finite("3"), is_finite(None)
        (True, False, False, False)
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def choice(config: Any, field: str, names: Iterable[str]) -> None:
    """Raises a ValueError with the near names unless the field's value is one of ``names``."""
    value = getattr(config, field)
    if value not in names:
        raise ValueError(
            f"{type(config).__name__}.{field}={value!r}: {did_you_mean(str(value), names)}"
        )


def check_finite(config: Any) -> None:
    """Raises a ValueError that names the field if a number of a dataclass is NaN or infinite."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        values = value if isinstance(value, tuple) else (value,)
        finite = all(math.isfinite(x) for x in values if isinstance(x, float))
        check(config, finite, field.name, "finite")


def is_integer(value: Any) -> bool:
    """Whether a value is an integer, Python's or NumPy's; True and False are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A hint that names the choices nearest to ``name``, or all where none is near.

    Example:
        >>> did_you_mean("gtp2", ["gpt2", "bert-base"])
        "did you mean 'gpt2'?"
    """
    names = list(names)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"choose one of {', '.join(map(repr, names))}"


def check_keys(
    block: Any, where: str, *, required: Iterable[str] = (), optional: Iterable[str] = ()
) -> None:
    """Raises a ValueError unless ``block``, from JSON, is an object with all required keys and no unknown one."""
    if not isinstance(block, Mapping):
        raise ValueError(f"{where}={block!r}: must be an object of keys and values")
    known = [*required, *optional]
    for key in block:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}: {did_you_mean(str(key), known)}")
    if missing := [key for key in required if key not in block]:
        raise ValueError(f"{where}: needs {', '.join(missing)}")


def switch(block: Any, where: str) -> bool:
    """Whether a block of JSON is ``enabled``, which it must say."""
    check_keys(block, where, required=("enabled",), optional=block)
    if not isinstance(block["enabled"], bool):
        raise ValueError(f"{where}.enabled={block['enabled']!r}: must be true or false")
    return block["enabled"]


def whole_number(value: Any, where: str) -> int:
    """A whole number of JSON, which tells no integers from other numbers: 1e5 is read as a float."""
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not is_whole:
        raise ValueError(f"{where}={value!r}: must be a whole number")
    return int(value)


def whole_numbers(value: Any, where: str) -> tuple[int, ...]:
    """A list of them."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where}={value!r}: must be a list")
    return tuple(whole_number(one, where) for one in value)
