"""The shape of a batch's tokens, for techniques that crop or count them."""

from collections.abc import Mapping
from typing import Any


def token_shape(batch: Mapping[str, Any], field: str) -> tuple[int, int]:
    """Return the shape ``(rows, seq)`` of a batch's tokens.

    Args:
        batch: A mapping of arrays by name.
        field: The name of the tokens.

    Raises:
        ValueError: The array is missing or does not have two dimensions.
    """
    shape = getattr(batch.get(field), "shape", ())
    if len(shape) != 2:
        arrays = {name: getattr(x, "shape", None) for name, x in batch.items()}
        found = ", ".join(f"{name} {shape}" for name, shape in arrays.items() if shape is not None)
        raise ValueError(
            f"a batch must have {field} of shape (rows, seq), got {found or 'no arrays'}. If the tokens have a different name, "
            'pass it as field="..."'
        )
    return shape
