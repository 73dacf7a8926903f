"""Conversion of users' token ids to arrays, without a cast that would change an id."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Bool, Int


def integers(values: Any) -> np.ndarray | None:
    """Return the values as an array of integers, or None if one is not an integer or rows differ in length."""
    try:
        array = np.asarray(values)
    except ValueError:  # rows of different lengths
        return None
    if array.size == 0:
        return array.astype(np.int64)  # NumPy makes an empty list an array of floats
    return array if array.dtype.kind in "iu" else None


def check_ids(ids: np.ndarray, limit: int, where: str, *, name: str = "token id") -> None:
    """Raise a ValueError that names the smallest or largest id unless all are at least 0 and below ``limit``."""
    for wrong in (int(ids.min()), int(ids.max())) if ids.size else ():
        if not 0 <= wrong < limit:
            raise ValueError(f"{name} {wrong} is outside {where}")


def left_pad(
    rows: Iterable[Any], pad_token_id: Any = 0
) -> tuple[Int[np.ndarray, "batch seq"], Bool[np.ndarray, "batch seq"]]:
    """Pad rows of token ids on the left to the same length.

    Args:
        rows: One list or array of token ids per row; their lengths may differ.
        pad_token_id: Token id that fills the shorter rows.

    Returns:
        The ids, int32, and a mask that is True at the given ids.

    Raises:
        ValueError: There are no rows, a row is empty or not a list of integers, or an id does not fit in int32.

    Example:
        >>> left_pad([[5, 6, 7], [8]])[0].tolist()
        [[5, 6, 7], [0, 0, 8]]
    """
    checked = [_int32(row, f"row {i}", ndim=1) for i, row in enumerate(rows)]
    if not checked:
        raise ValueError("rows must contain at least one row, got none")
    width = max(map(len, checked))
    tokens = np.full((len(checked), width), _int32(pad_token_id, "pad_token_id", ndim=0))
    mask = np.zeros(tokens.shape, bool)
    for i, ids in enumerate(checked):
        tokens[i, width - len(ids) :] = ids
        mask[i, width - len(ids) :] = True
    return tokens, mask


def _int32(values: Any, name: str, *, ndim: int) -> np.ndarray:
    ids = integers(values)
    if ids is None or ids.ndim != ndim or ids.size == 0:
        wanted = "an integer" if ndim == 0 else "a non-empty list of integers"
        raise ValueError(f"{name} must be {wanted}, got {values!r}")
    check_ids(ids, 2**31, "int32", name=f"{name}: token id")
    return ids.astype(np.int32)
