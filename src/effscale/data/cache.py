"""What a cache of built files needs: keys that stand for requests, and locks."""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any


def cache_folder(name: str) -> pathlib.Path:
    """``name`` in the user's cache folder, by the XDG rule."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "effscale" / name


def request_key(request: Mapping[str, Any]) -> str:
    """A short name for a request of plain values; another request has another."""
    return hashlib.blake2b(json.dumps(request, sort_keys=True).encode(), digest_size=8).hexdigest()


@contextlib.contextmanager
def lock(target: pathlib.Path) -> Iterator[None]:
    """Holds the lock that belongs to a file or folder, where the platform has locks."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{target.name}.lock", "ab") as stream:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
