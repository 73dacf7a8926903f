"""Checks of optimizer options whose values are known: `optax.inject_hyperparams` passes traced ones."""

from collections.abc import Callable
from typing import Any

import jax


def known(value: Any) -> float | None:
    """Return the value of an option as a number; None if it is traced or None."""
    return None if value is None or isinstance(value, jax.core.Tracer) else float(value)


def check_number(name: str, value: Any, holds: Callable[[float], bool], wanted: str) -> None:
    """Raise a ``ValueError`` that names the option and its value unless ``holds``, if the value is known.

    >>> check_number("b1", 1.5, lambda b: 0 <= b < 1, "be in [0, 1)")
    Traceback (most recent call last):
    ValueError: b1 must be in [0, 1), got 1.5
    """
    number = known(value)
    if number is not None and not holds(number):
        raise ValueError(f"{name} must {wanted}, got {value}")


def check_count(name: str, value: Any, least: int, why: str = "") -> None:
    """Raise a ``ValueError`` unless the value is a whole number of at least ``least``, if it is known.

    >>> check_count("freeze_step", 0, 1)
    Traceback (most recent call last):
    ValueError: freeze_step must be a whole number of at least 1, got 0
    """
    wanted = f"be a whole number of at least {least}{why}"
    check_number(name, value, lambda x: x >= least and x % 1 == 0, wanted)


def check_bounds(low: tuple[str, Any], high: tuple[str, Any], least: float, wanted: str) -> None:
    """Raise a ``ValueError`` unless ``least <= low <= high``, each a name and a value, if they are known.

    >>> check_bounds(("min_coeff", 2.0), ("max_coeff", 1.0), 0.0, "be in increasing order and not negative")
    Traceback (most recent call last):
    ValueError: min_coeff and max_coeff must be in increasing order and not negative, got 2.0 and 1.0
    """
    smaller, larger = known(low[1]), known(high[1])
    if smaller is not None and larger is not None and not least <= smaller <= larger:
        raise ValueError(f"{low[0]} and {high[0]} must {wanted}, got {low[1]} and {high[1]}")
