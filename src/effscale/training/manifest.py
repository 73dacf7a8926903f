"""Checksums of a folder: the file that makes a checkpoint count.

Orbax notices a missing file but not every flipped bit. The manifest lists each file with its size and BLAKE2b digest; it
is written last, and atomically, so a folder without one was never finished.
"""

import hashlib
import json
import os
import pathlib

from effscale.training.serialize import write_json

MANIFEST = "manifest.json"


def digest(path: pathlib.Path) -> str:
    """BLAKE2b of a file's content, 128 bits, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    found = [pathlib.Path(root, name) for root, _, names in os.walk(folder) for name in names]
    return sorted(path for path in found if path != folder / MANIFEST)


def write_manifest(folder: pathlib.Path) -> None:
    """Record every file of ``folder``."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "blake2b": digest(path)}
        for path in _files(folder)
    }
    write_json(folder / MANIFEST, {"files": files})


def verify_manifest(folder: pathlib.Path) -> str | None:
    """What is wrong with a folder, or None if it is as it was written.

    Sizes are compared first, so that a truncated file is found without reading the others.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing: the checkpoint was not finished"
    except (ValueError, KeyError, TypeError, OSError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
    for name, entry in files.items():
        try:
            if digest(folder / name) != entry["blake2b"]:
                return f"{name} has changed since it was written"
        except OSError as error:
            return f"{name} cannot be read ({error})"
    return None
