"""The field of a record that contains the text."""

import difflib
from collections.abc import Iterable


def check(field: str) -> None:
    """Raise an error for an empty field name."""
    if not field:
        raise ValueError("field must be the name of the field that contains the text, got ''")


def missing(field: str, names: Iterable[object]) -> str:
    """Return a message that a field is missing, with the fields that exist, the most similar first.

    >>> missing("txt", ["id", "text"])
    "no field 'txt'; the fields are 'text', 'id'"
    """
    present = [str(name) for name in names]
    near = difflib.get_close_matches(field, present, n=3)
    listed = near + [name for name in present if name not in near]
    shown = ", ".join(repr(name) for name in listed[:12]) or "none"
    return f"no field {field!r}; the fields are {shown}"
