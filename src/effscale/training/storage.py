"""Folders of checkpoints on local disks and in Google Cloud Storage, and the few operations in which these differ.

A bucket has no folders, no rename and no append. An object appears whole or not at all, and the store keeps a checksum of each.
So a checkpoint there is written in place, the mark beside it says that it is unfinished, and its manifest, written last, says
that it is complete.
"""

import importlib.util
import os
import pathlib
import re
import shutil
from typing import Any

from etils import epath
from etils.epath import backend as epath_backend

from effscale.training.paths import is_url, local_path

AnyPath = pathlib.Path | epath.Path
"""A folder or file of either kind; most methods are the same."""


def folder_path(path: str | os.PathLike[str]) -> AnyPath:
    """The folder that a path names: absolute on this machine, or ``gs://bucket/...``.

    Raises:
        ImportError: A bucket is named, and the package that reaches it is missing.
        ValueError: The path is a URL of another kind: Orbax writes arrays to local folders and Google Cloud Storage alone.
        OSError: The bucket cannot be read, as without credentials.
    """
    text = os.fspath(path)
    if not is_url(text):
        return local_path(path)
    if not re.match(r"gs:/", text):
        raise ValueError(
            f"{text!r}: checkpoints are written to local folders and to gs:// only, as Orbax writes its arrays; give a local folder, "
            "and RunMirror copies what is finished to any store that fsspec knows, or mount the bucket"
        )
    if re.search(r"[*?\[]", text):
        raise ValueError(
            f"{text!r} holds *, ? or [, which clients of buckets take for patterns; choose another name"
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise ImportError(f"{text!r} needs gcsfs: install it with pip install gcsfs")
    folder = epath.Path(re.sub(r"^gs:/+", "gs://", text))
    try:
        _store(folder).find(str(folder), maxdepth=1)
    except (
        Exception
    ) as error:  # whatever the client raises: of credentials, of rights, of the network
        raise OSError(
            f"{folder} cannot be read ({type(error).__name__}: {error}); see that the bucket exists, and log in (gcloud auth application-default login), or give the "
            "machine's service account the role Storage Object Admin on the bucket"
        ) from error
    return folder


def is_local(path: AnyPath) -> bool:
    """Whether a path is on this machine."""
    return isinstance(path, pathlib.Path)


def make_folder(path: AnyPath) -> None:
    """Make a local folder with its parents; a bucket needs none."""
    if is_local(path):
        path.mkdir(parents=True, exist_ok=True)


def remove(path: AnyPath) -> None:
    """Remove a folder with all that is in it, or a file.

    Raises:
        FileNotFoundError: There is none.
    """
    if not is_local(path):
        _store(path).rm(str(path), recursive=True)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def move(source: AnyPath, target: AnyPath) -> None:
    """Move a folder. In a bucket its objects are copied by the store, one by one, and then removed."""
    if is_local(source):
        make_folder(target.parent)
        source.rename(target)
    else:
        store = _store(source)
        store.copy(str(source), str(target), recursive=True)
        store.rm(str(source), recursive=True)


def stored_checksums(folder: AnyPath) -> dict[str, tuple[int, str]]:
    """Size and CRC-32C of each object below a folder of a bucket, by name; the store computed them when it took the object."""
    found = _store(folder).find(str(folder), detail=True)
    root = str(folder).removeprefix("gs://").rstrip("/") + "/"
    return {
        name.removeprefix(root): (int(entry["size"]), str(entry["crc32c"]))
        for name, entry in found.items()
    }


def _store(path: AnyPath) -> Any:
    """The file system of a bucket by fsspec, the one that etils and Orbax use, without its cache of listings.

    The arrays do not pass through it, but through TensorStore, so what it remembers of a folder would be out of date.
    """
    store = epath_backend.fsspec_backend.fs(str(path))
    store.dircache.use_listings_cache = False
    store.invalidate_cache()
    return store
