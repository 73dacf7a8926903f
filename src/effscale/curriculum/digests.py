"""Digests that identify corpora and metrics."""

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

    For `PackedTokens` it is computed from the token store's digest and the packing options. For any other
    source, it is computed from its length and the content of 64 rows spread evenly over it: a change of a single
    row between them is not detected.

    Args:
        source: A source with ``len()`` that returns rows, dicts of arrays, by position.

    Raises:
        ValueError: A row is not a dict, or contains objects.
    """
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(source, PackedTokens):
        facts = {
            "store": source.store.manifest["digest"],
            "length": source.length,
            "cross_document": source.cross_document,
            "drop_remainder": source.drop_remainder,
            "pad_id": source.pad_token_id,
        }
        digest.update(json.dumps(facts, sort_keys=True).encode())
        return f"packed-{digest.hexdigest()}"
    count = len(source)
    digest.update(str(count).encode())
    sampled = min(count, SAMPLED_ROWS)
    for number in range(sampled):
        # From the first to the last row, in integer arithmetic, as floats are not exact above 2^53.
        index = number * (count - 1) // max(sampled - 1, 1)
        _add_row(digest, source[index], index)
    return f"rows-{digest.hexdigest()}"


def _add_row(digest: Any, row: Any, index: int) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"row {index} must be a dict of arrays, got {type(row).__name__}")
    for key in sorted(row):
        array = np.asarray(row[key])
        if array.dtype.hasobject:
            raise ValueError(f"field {key!r} of row {index} must be a numeric array, got objects")
        digest.update(f"{key}{array.dtype.str}{array.shape}".encode() + array.tobytes())


def metric_digest(metric: Any) -> str | None:
    """Return a digest of a metric and its parameters, or None if it cannot be identified.

    A metric may have an attribute ``digest``, a string. Otherwise the digest is computed from its pickle,
    and for a function also from its source, so that results of an earlier version are not mistaken for those
    of a later one. Functions that it calls are not considered. A lambda or a closure has no digest.
    """
    if isinstance(getattr(metric, "digest", None), str):
        return f"{type(metric).__qualname__}-{metric.digest}"
    try:
        content = pickle.dumps(metric, protocol=4)
    except Exception:  # each type raises a different error
        return None
    try:
        code = inspect.getsource(metric if inspect.isroutine(metric) else type(metric))
    except (OSError, TypeError):
        code = ""
    return hashlib.blake2b(content + code.encode(), digest_size=16).hexdigest()
