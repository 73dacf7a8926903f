"""Paths that are written to: the one place where URLs and unusable folders are refused."""

import os
import pathlib
import re

# pathlib turns "gs://bucket" into "gs:/bucket", so one slash is enough; a single letter is a Windows drive.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def is_url(path: str) -> bool:
    """Return whether a path names a place on another machine, such as ``gs://bucket/run``."""
    return _URL.match(path) is not None


def local_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """Return the path of a file or folder on this machine, which need not exist.

    Raises:
        ValueError: ``path`` is a URL, for instance of a bucket, which `pathlib` would take for a relative folder.
        OSError: The file system refuses the path, for instance because a name is too long.

    >>> local_path("gs://bucket/run")
    Traceback (most recent call last):
    ...
    ValueError: 'gs://bucket/run' must be a local path: only the checkpoints and the mirror (mirror=) of a run are written to buckets. Use a local folder, and copy it or mount the bucket.
    """
    if is_url(os.fspath(path)):
        url = re.sub(":/+", "://", os.fspath(path), count=1)  # pathlib leaves one slash
        raise ValueError(
            f"{url!r} must be a local path: only the checkpoints and the mirror (mirror=) of a run are written to "
            "buckets. Use a local folder, and copy it or mount the bucket."
        )
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise _unusable(path, error) from error
    return pathlib.Path(path)


def output_folder(path: str | os.PathLike[str]) -> pathlib.Path:
    """Return the path of a local folder that can be written to; it is created with its parents if it is missing.

    Raises:
        ValueError: ``path`` is a URL.
        OSError: The folder cannot be created or written to.
    """
    folder = local_path(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: is not a folder. Choose another path.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(path, error) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder}: cannot be written to. Choose another folder.")
    return folder


def _unusable(path: str | os.PathLike[str], error: OSError) -> OSError:
    """Return an error of the same kind with a message for users; as the system raises it, it would have a traceback."""
    return type(error)(f"{os.fspath(path)}: {error.strerror}. Choose another path.")
