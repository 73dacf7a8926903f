"""Paths of folders that a run writes to."""

import os
import pathlib
import re

# pathlib makes "gs:/bucket" of "gs://bucket", so one slash is enough; a single letter is a drive of Windows.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def is_url(path: str) -> bool:
    """Return whether a path names a place on another machine, such as ``gs://bucket/run``."""
    return _URL.match(path) is not None


def local_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """Return the absolute path of a file or folder on this machine.

    Raises:
        ValueError: ``path`` is a URL, as of a bucket, which `pathlib` would take for a relative folder.

    >>> local_path("gs://bucket/run")
    Traceback (most recent call last):
    ...
    ValueError: 'gs://bucket/run' is a URL, and a run folder is local: give a local path, and RunMirror copies the run there
    """
    if is_url(os.fspath(path)):
        raise ValueError(
            f"{os.fspath(path)!r} is a URL, and a run folder is local: give a local path, and RunMirror copies the run there"
        )
    return pathlib.Path(path).resolve()
