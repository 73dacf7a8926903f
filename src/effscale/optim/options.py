"""Options of optimizers, checked where their values are known: `optax.inject_hyperparams` hands over traced ones."""

from collections.abc import Callable
from typing import Any

import jax


def known(value: Any) -> float | None:
    """Return the number that an option is; None if only the running program knows it, or if it is None."""
    return None if value is None or isinstance(value, jax.core.Tracer) else float(value)


def check_number(name: str, value: Any, holds: Callable[[float], bool], wanted: str) -> None:
    """Raise a ``ValueError`` that names the option and its value unless ``holds``, where the value is known.

    >>> check_number("b1", 1.5, lambda b: 0 <= b < 1, "lie in [0, 1)")
    Traceback (most recent call last):
    ValueError: b1=1.5 must lie in [0, 1)
    """
    number = known(value)
    if number is not None and not holds(number):
        raise ValueError(f"{name}={value} must {wanted}")


def check_count(name: str, value: Any, least: int, why: str = "") -> None:
    """Raise likewise unless the number is a whole one, and ``least`` or more.

    >>> check_count("freeze_step", 0, 1)
    Traceback (most recent call last):
    ValueError: freeze_step=0 must be a whole number of at least 1
    """
    wanted = f"be a whole number of at least {least}{why}"
    check_number(name, value, lambda x: x >= least and x % 1 == 0, wanted)


def check_bounds(low: tuple[str, Any], high: tuple[str, Any], least: float, wanted: str) -> None:
    """Raise likewise unless ``least <= low <= high``, each a name and a value.

    >>> check_bounds(("min_coeff", 2.0), ("max_coeff", 1.0), 0.0, "be ordered and not negative")
    Traceback (most recent call last):
    ValueError: min_coeff=2.0 and max_coeff=1.0 must be ordered and not negative
    """
    smaller, larger = known(low[1]), known(high[1])
    if smaller is not None and larger is not None and not least <= smaller <= larger:
        raise ValueError(f"{low[0]}={low[1]} and {high[0]}={high[1]} must {wanted}")
