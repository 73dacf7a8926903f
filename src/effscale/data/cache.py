"""Keys of a cache of built files."""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any


def cache_folder(name: str) -> pathlib.Path:
    """``name`` in the user's cache folder, by the XDG rule."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "effscale" / name


def request_key(request: Mapping[str, Any]) -> str:
    """A short name for a request of plain values; another request has another."""
    return hashlib.blake2b(json.dumps(request, sort_keys=True).encode(), digest_size=8).hexdigest()
