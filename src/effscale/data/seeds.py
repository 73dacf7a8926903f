"""What may be a seed."""

import numbers
from typing import Any


def check_seed(seed: Any) -> None:
    """Raises a ValueError unless ``seed`` is an integer, Python's or NumPy's, and not negative.

    NumPy would take an empty tuple or a list as well, without saying what it makes of them.

    Example:
        >>> check_seed(())
        Traceback (most recent call last):
        ValueError: seed=(): it must be an integer, 0 or above.
    """
    if not isinstance(seed, numbers.Integral) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed={seed!r}: it must be an integer, 0 or above.")
