"""Token ids as users give them, turned into arrays without a cast that would change one."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Bool, Int


def integers(values: Any) -> np.ndarray | None:
    """The values as an array of integers; None where one is no integer, or where rows differ in length."""
    try:
        array = np.asarray(values)
    except ValueError:  # rows of different lengths
        return None
    if array.size == 0:
        return array.astype(np.int64)  # NumPy takes an empty list for floats
    return array if array.dtype.kind in "iu" else None


def check_ids(ids: np.ndarray, limit: int, where: str, *, name: str = "token id") -> None:
    """Raises a ValueError that names the smallest or largest id unless all are from 0 to below ``limit``."""
    for wrong in (int(ids.min()), int(ids.max())) if ids.size else ():
        if not 0 <= wrong < limit:
            raise ValueError(f"{name} {wrong} is outside {where}")


def left_pad(
    rows: Iterable[Any], pad_id: Any = 0
) -> tuple[Int[np.ndarray, "batch seq"], Bool[np.ndarray, "batch seq"]]:
    """Pads rows of token ids on the left to one length.

    Args:
        rows: One list or array of token ids per row; their lengths may differ.
        pad_id: What stands before the shorter rows.

    Returns:
        The ids, int32, and a mask that is True at the ids that were given.

    Raises:
        ValueError: If there is no row, a row is empty or not a list of integers, or an id does not fit int32.

    Example:
        >>> left_pad([[5, 6, 7], [8]])[0].tolist()
        [[5, 6, 7], [0, 0, 8]]
    """
    checked = [_int32(row, f"row {i}", ndim=1) for i, row in enumerate(rows)]
    if not checked:
        raise ValueError("left_pad needs at least one row")
    width = max(map(len, checked))
    tokens = np.full((len(checked), width), _int32(pad_id, "pad_id", ndim=0))
    mask = np.zeros(tokens.shape, bool)
    for i, ids in enumerate(checked):
        tokens[i, width - len(ids) :] = ids
        mask[i, width - len(ids) :] = True
    return tokens, mask


def _int32(values: Any, name: str, *, ndim: int) -> np.ndarray:
    ids = integers(values)
    if ids is None or ids.ndim != ndim or ids.size == 0:
        wanted = "an integer" if ndim == 0 else "a list of integers, not empty"
        raise ValueError(f"{name} is {values!r}: must be {wanted}")
    check_ids(ids, 2**31, "int32", name=f"{name}: token id")
    return ids.astype(np.int32)
