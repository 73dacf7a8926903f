"""Paths of the folders that a run writes to."""

import os
import pathlib
import re

# pathlib turns "gs://bucket" into "gs:/bucket", so one slash is enough; a single letter is a Windows drive.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def is_url(path: str) -> bool:
    """Return whether a path names a place on another machine, such as ``gs://bucket/run``."""
    return _URL.match(path) is not None


def local_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """Return the absolute path of a file or folder on this machine.

    Raises:
        ValueError: ``path`` is a URL, for instance of a bucket, which `pathlib` would take for a relative folder.

    >>> local_path("gs://bucket/run")
    Traceback (most recent call last):
    ...
    ValueError: a run folder must be local, got 'gs://bucket/run'. Use a local path, and mirror= to keep a copy in a bucket.
    """
    if is_url(os.fspath(path)):
        raise ValueError(
            f"a run folder must be local, got {os.fspath(path)!r}. Use a local path, and mirror= to keep a copy in a bucket."
        )
    return pathlib.Path(path).resolve()
