"""What techniques that cut or count tokens ask of a batch."""

from collections.abc import Mapping
from typing import Any


def token_shape(batch: Mapping[str, Any], field: str) -> tuple[int, int]:
    """Return the shape ``(rows, seq)`` of a batch's tokens.

    Args:
        batch: Of arrays by name.
        field: The name of the tokens.

    Raises:
        ValueError: There is no such array, or it has not two dimensions.
    """
    shape = getattr(batch.get(field), "shape", ())
    if len(shape) != 2:
        arrays = {name: getattr(x, "shape", None) for name, x in batch.items()}
        found = ", ".join(f"{name} {shape}" for name, shape in arrays.items() if shape is not None)
        raise ValueError(
            f"a batch needs {field} of shape (rows, seq); it has {found or 'no arrays'}. If its tokens have another name, "
            'give that: field="..."'
        )
    return shape
