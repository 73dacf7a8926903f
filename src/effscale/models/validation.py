"""Validation of configs and of JSON from other projects: each error names the field, its value and what is valid."""

import dataclasses
import math
from collections.abc import Iterable
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
    """Raise a ValueError that names the field if a number of a dataclass is NaN, infinite or an integer of more than 64 bits,
    or a text contains bytes that are not UTF-8, which Python reads from a command line as surrogates.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        values = value if isinstance(value, tuple) else (value,)
        finite = all(math.isfinite(x) for x in values if isinstance(x, float))
        check(config, finite, field.name, "finite")
        small = all(abs(x) < 2**63 for x in values if isinstance(x, int))
        check(config, small, field.name, "below 2**63")
        texts = "".join(x for x in values if isinstance(x, str))
        check(config, texts == texts.encode(errors="replace").decode(), field.name, "valid UTF-8")
