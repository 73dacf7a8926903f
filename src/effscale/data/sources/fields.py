"""The field of a record that holds the text."""

import difflib
from collections.abc import Iterable


def check(field: str) -> None:
    """Refuses an empty field name."""
    if not field:
        raise ValueError("field='': give the name of the field that holds the text.")


def missing(field: str, names: Iterable[object]) -> str:
    """Says that a field is absent and which ones are there, the nearest first.

    >>> missing("txt", ["id", "text"])
    "no field 'txt'; there are 'text', 'id'"
    """
    present = [str(name) for name in names]
    near = difflib.get_close_matches(field, present, n=3)
    listed = near + [name for name in present if name not in near]
    shown = ", ".join(repr(name) for name in listed[:12]) or "none"
    return f"no field {field!r}; there are {shown}"
