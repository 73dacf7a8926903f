"""Memory of the machine that an experiment runs on."""

import ctypes
import resource
import sys


def peak_memory() -> float:
    """Return the peak resident memory of this process so far, in megabytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def keep_freed_memory() -> None:
    """Make the C library keep freed memory instead of returning it to the kernel; applies to the whole process.

    XLA's CPU backend allocates temporaries at each step. Memory that comes fresh from the kernel causes a fault for
    each page, which takes about 5 percent of a small training step. Does nothing if the C library is not glibc.
    """
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # numbers from malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_max, 0)  # allocate large blocks on the heap, which is kept
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_arena_max, 1)  # the heaps of threads are too small for large blocks
    except (OSError, AttributeError):
        pass
