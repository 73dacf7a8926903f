"""Validation of seeds."""

import numbers
from typing import Any


def check_seed(seed: Any) -> None:
    """Raise a ValueError unless ``seed`` is a nonnegative integer, of Python or NumPy.

    NumPy would also accept an empty tuple or a list, without documenting what it does with them.

    Example:
        >>> check_seed(())
        Traceback (most recent call last):
        ValueError: seed must be an integer, 0 or above, got ()
    """
    if not isinstance(seed, numbers.Integral) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed must be an integer, 0 or above, got {seed!r}")
