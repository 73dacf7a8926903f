"""Errors of configs: each names the field, its value, and what would do."""

import difflib
from collections.abc import Iterable
from typing import Any


def check(config: Any, holds: bool, field: str, wanted: str) -> None:
    """Raises a ValueError that names ``field`` and its value unless ``holds``."""
    if not holds:
        raise ValueError(
            f"{type(config).__name__}.{field}={getattr(config, field)!r}: must be {wanted}"
        )


def choice(config: Any, field: str, names: Iterable[str]) -> None:
    """Raises a ValueError with the near names unless the field's value is one of ``names``."""
    value = getattr(config, field)
    if value not in names:
        raise ValueError(
            f"{type(config).__name__}.{field}={value!r}: {did_you_mean(str(value), names)}"
        )


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
