"""What tells one corpus, or one metric, from another."""

import hashlib
import inspect
import json
import pickle
from typing import Any

import numpy as np

from effscale.data import PackedTokens

SAMPLED_ROWS = 64


def fingerprint(source: Any) -> str:
    """Return a digest of a source of rows, to check that an index belongs to it.

    For `PackedTokens` it is made of the token store's digest and the options of packing. For any other
    source, of its length and of the contents of 64 rows spread evenly over it: a change of a single
    row between them is not noticed.

    Args:
        source: Has ``len()`` and gives rows, dicts of arrays, by position.

    Raises:
        ValueError: A row is no dict, or holds objects.
    """
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(source, PackedTokens):
        facts = {
            "store": source.store.manifest["digest"],
            "length": source.length,
            "cross_document": source.cross_document,
            "drop_remainder": source.drop_remainder,
            "pad_id": source.pad_id,
        }
        digest.update(json.dumps(facts, sort_keys=True).encode())
        return f"packed-{digest.hexdigest()}"
    count = len(source)
    digest.update(str(count).encode())
    sampled = min(count, SAMPLED_ROWS)
    for number in range(sampled):
        # From the first to the last row, in whole numbers: floats are not exact above 2^53.
        index = number * (count - 1) // max(sampled - 1, 1)
        _add_row(digest, source[index], index)
    return f"rows-{digest.hexdigest()}"


def _add_row(digest: Any, row: Any, index: int) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"row {index} is {type(row).__name__}: it must be a dict of arrays.")
    for key in sorted(row):
        array = np.asarray(row[key])
        if array.dtype.hasobject:
            raise ValueError(f"field {key!r} of row {index} holds objects: it must be an array.")
        digest.update(f"{key}{array.dtype.str}{array.shape}".encode() + array.tobytes())


def metric_digest(metric: Any) -> str | None:
    """Return a digest of a metric and its parameters, or None where it cannot be told from others.

    A metric may have an attribute ``digest``, a string. Otherwise it is what pickle writes of it,
    and for a function its source too, so that work done with an earlier version is not taken for that
    of a later one. What the function calls is not looked at. A lambda or a closure has no digest.
    """
    if isinstance(getattr(metric, "digest", None), str):
        return f"{type(metric).__qualname__}-{metric.digest}"
    try:
        content = pickle.dumps(metric, protocol=4)
    except Exception:  # each type has its own way to refuse
        return None
    try:
        code = inspect.getsource(metric if inspect.isroutine(metric) else type(metric))
    except (OSError, TypeError):
        code = ""
    return hashlib.blake2b(content + code.encode(), digest_size=16).hexdigest()
