"""Checksums of a folder: the file that marks a checkpoint as complete.

Orbax detects a missing file but not every flipped bit. The manifest lists each file with its size and BLAKE2b digest. It
is written last and atomically, so a folder without one is incomplete. In a bucket it lists the CRC-32C that the store
keeps for each object: no byte is read again, and one listing finds objects that are missing, truncated or replaced.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from effscale.training.serialize import write_json
from effscale.training.storage import AnyPath, is_local, stored_checksums

MANIFEST = "manifest.json"


def digest(path: pathlib.Path) -> str:
    """Return the 128-bit BLAKE2b digest of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    found = [pathlib.Path(root, name) for root, _, names in os.walk(folder) for name in names]
    return sorted(path for path in found if path != folder / MANIFEST)


def digest_part(folder: AnyPath, index: int, count: int) -> dict[str, tuple[int, str]]:
    """Return size and digest, by name, of the files assigned to this process; in a bucket the store has all digests."""
    if not isinstance(folder, pathlib.Path):
        return {}
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}
    return {name: (sizes[name], digest(folder / name)) for name in _part_of(sizes, index, count)}


def write_manifest(folder: AnyPath, known: Mapping[str, Sequence[Any]] | None = None) -> None:
    """Record every file of ``folder``.

    Args:
        folder: The folder.
        known: Known sizes and digests by file name. Other files, and those whose size differs, are read.
    """
    if isinstance(folder, pathlib.Path):
        files = {}
        for path in _files(folder):
            name, size = path.relative_to(folder).as_posix(), path.stat().st_size
            there, found = (known or {}).get(name, (None, ""))
            files[name] = {"bytes": size, "blake2b": found if there == size else digest(path)}
        write_json(folder / MANIFEST, _content(files))
    else:
        stored = stored_checksums(folder)
        stored.pop(MANIFEST, None)
        files = {name: {"bytes": size, "crc32c": crc} for name, (size, crc) in stored.items()}
        (folder / MANIFEST).write_text(json.dumps(_content(files), indent=2) + "\n")


def verify_manifest(folder: AnyPath, index: int = 0, count: int = 1) -> str | None:
    """Return what is wrong with a folder, or None if it is as it was written. Never raises, even for an invalid manifest.

    Sizes are compared first, which finds a truncated file without reading the others.

    Args:
        folder: The folder.
        index: The index of this process; each process checks its part of the files. Only the first lists a bucket.
        count: The number of processes.
    """
    if index and not is_local(folder):
        return None
    kind = "blake2b" if is_local(folder) else "crc32c"
    try:
        files = _read_manifest(folder, kind)
    except FileNotFoundError:
        return f"{MANIFEST} is missing: the checkpoint is incomplete"
    except (ValueError, OSError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    try:
        if isinstance(folder, pathlib.Path):
            sizes = {name: size for name, (size, _) in files.items()}
            files = {name: files[name] for name in _part_of(sizes, index, count)}
        found = (
            _sizes(folder, files) if isinstance(folder, pathlib.Path) else stored_checksums(folder)
        )
        for name, (size, _) in files.items():
            if name not in found:
                return f"{name} is missing"
            if found[name][0] != size:
                return f"{name} has {found[name][0]} bytes instead of {size}"
        for name, (_, expected) in files.items():
            now = digest(folder / name) if isinstance(folder, pathlib.Path) else found[name][1]
            if now != expected:
                return f"{name} has changed since it was written"
    except OSError as error:
        return f"a file cannot be read ({error})"
    return None


def _part_of(sizes: Mapping[str, int], index: int, count: int) -> list[str]:
    """Return the names assigned to one of several processes, with about the same number of bytes for each.

    All processes compute the same assignment.
    """
    return sorted(sizes, key=lambda name: (-sizes[name], name))[index::count]


def _sizes(folder: pathlib.Path, names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Return the size of each existing file, with an empty digest, as computing it is slow."""
    return {name: (path.stat().st_size, "") for name in names if (path := folder / name).is_file()}


def _read_manifest(folder: AnyPath, kind: str) -> dict[str, tuple[int, str]]:
    """Return size and digest of each file, by its name relative to the folder.

    Raises:
        ValueError: The file is not a manifest.
    """
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    content = json.loads(text, object_pairs_hook=_without_duplicates)
    files = _part(content, "files", dict)
    if len(content) > 1 and content != _content(files):  # older manifests have only the files
        raise ValueError("its entries have changed since it was written")
    if not files:
        raise ValueError("it lists no files")
    for name in files:
        if pathlib.PurePath(name).is_absolute() or ".." in pathlib.PurePath(name).parts:
            raise ValueError(f"{name!r} is outside the folder")
    return {
        name: (_part(entry, "bytes", int), _part(entry, kind, str)) for name, entry in files.items()
    }


def _content(files: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest of the files, with a digest of their entries, which shows if one is lost."""
    entries = json.dumps(files, sort_keys=True).encode()
    return {
        "files": files,
        "files_blake2b": hashlib.blake2b(entries, digest_size=16).hexdigest(),
    }


def _part(block: Any, key: str, kind: type) -> Any:
    if not isinstance(block, dict) or not isinstance(block.get(key), kind):
        raise ValueError(f"it has no valid {key!r}")
    return block[key]


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object without duplicate names: `json` would drop the first of two, and that file would not be checked."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it contains a name twice")
    return found
