"""The location of the user's cache."""

import os
import pathlib


def cache_folder(name: str) -> pathlib.Path:
    """Return the path ``name`` in the user's cache folder, following the XDG convention."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "effscale" / name
