"""The machine that an experiment runs on: its memory and its cache folder."""

import ctypes
import os
import pathlib
import resource
import sys


def cache_folder(name: str) -> pathlib.Path:
    """``name`` in the user's cache folder, by the XDG rule."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "effscale" / name


def peak_memory() -> float:
    """Greatest resident memory of this process so far, in megabytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def keep_freed_memory() -> None:
    """Lets the C library keep large freed blocks instead of handing them back to the kernel.

    XLA's CPU backend allocates a step's temporaries anew at each step; when they come fresh from the kernel, every page
    faults again. Does nothing where the C library is not glibc.
    """
    m_trim_threshold, m_mmap_threshold, one_terabyte = -1, -3, 2**31 - 1
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_threshold, one_terabyte)
        libc.mallopt(m_trim_threshold, one_terabyte)
    except (OSError, AttributeError):
        pass
