"""Checkpoint folders on local disks and in Google Cloud Storage, and the operations in which these differ.

A bucket has no folders, no rename and no append. An object appears completely or not at all, and the store keeps a checksum of
each. So in a bucket a checkpoint is written in place: a marker object says that it is unfinished, and its manifest, written
last, says that it is complete.
"""

import os
import pathlib
import re
import shutil
from typing import Any

from etils import epath
from etils.epath import backend as epath_backend

from effscale.extras import require
from effscale.paths import is_url, local_path, output_folder

AnyPath = pathlib.Path | epath.Path
"""A folder or file of either kind; most methods are the same."""


def folder_path(path: str | os.PathLike[str]) -> AnyPath:
    """Return the folder of a path: an absolute path on this machine, or ``gs://bucket/...``.

    Raises:
        ImportError: The path names a bucket, and the package to access it is missing.
        ValueError: The path is a different kind of URL: Orbax writes arrays only to local folders and Google Cloud Storage.
        OSError: The bucket cannot be read, for instance because credentials are missing.
    """
    text = os.fspath(path)
    if not is_url(text):
        return local_path(path).resolve()
    if not re.match(r"gs:/", text):
        raise ValueError(
            f"checkpoints must be in a local folder or gs://, where Orbax can write arrays, got {text!r}. Use a local folder "
            "and RunMirror, which copies finished checkpoints to any store that fsspec supports, or mount the bucket."
        )
    if re.search(r"[*?\[]", text):
        raise ValueError(
            f"the path of a bucket must not contain *, ? or [, which clients treat as patterns, got {text!r}"
        )
    require(repr(text), "gcsfs")
    folder = epath.Path(re.sub(r"^gs:/+", "gs://", text))
    try:
        _store(folder).find(str(folder), maxdepth=1)
    except Exception as error:  # any error of the client: credentials, permissions, network
        raise OSError(
            f"{folder}: cannot be read ({type(error).__name__}: {error}). Check that the bucket exists, and log in (gcloud auth application-default login) or give the "
            "machine's service account the role Storage Object Admin on the bucket."
        ) from error
    return folder


def is_local(path: AnyPath) -> bool:
    """Return whether a path is on this machine."""
    return isinstance(path, pathlib.Path)


def make_folder(path: AnyPath) -> None:
    """Create a local folder with its parents; buckets need no folders."""
    if is_local(path):
        output_folder(path)


def remove(path: AnyPath) -> None:
    """Remove a file, or a folder with its content.

    Raises:
        FileNotFoundError: The path does not exist.
    """
    if not is_local(path):
        _store(path).rm(str(path), recursive=True)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def move(source: AnyPath, target: AnyPath) -> None:
    """Move a folder. In a bucket, the store copies its objects one by one, and then they are removed."""
    if is_local(source):
        make_folder(target.parent)
        source.rename(target)
    else:
        store = _store(source)
        store.copy(str(source), str(target), recursive=True)
        store.rm(str(source), recursive=True)


def stored_checksums(folder: AnyPath) -> dict[str, tuple[int, str]]:
    """Return size and CRC-32C, by name, of each object in a folder of a bucket; the store computed them on upload."""
    found = _store(folder).find(str(folder), detail=True)
    root = str(folder).removeprefix("gs://").rstrip("/") + "/"
    return {
        name.removeprefix(root): (int(entry["size"]), str(entry["crc32c"]))
        for name, entry in found.items()
    }


def _store(path: AnyPath) -> Any:
    """Return the fsspec file system of a bucket, the one that etils and Orbax use, without its cache of listings.

    Orbax writes the arrays through TensorStore instead, so the cached listing of a folder would be out of date.
    """
    store = epath_backend.fsspec_backend.fs(str(path))
    store.dircache.use_listings_cache = False
    store.invalidate_cache()
    return store
