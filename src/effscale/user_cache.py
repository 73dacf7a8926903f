"""Where the user's cache lies."""

import os
import pathlib


def cache_folder(name: str) -> pathlib.Path:
    """``name`` in the user's cache folder, by the XDG rule."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "effscale" / name
