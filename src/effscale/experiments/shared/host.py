"""The machine that an experiment runs on: its memory."""

import ctypes
import resource
import sys


def peak_memory() -> float:
    """Greatest resident memory of this process so far, in megabytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def keep_freed_memory() -> None:
    """Lets the C library keep freed blocks instead of handing them back to the kernel; a setting of the whole process.

    XLA's CPU backend allocates a step's temporaries anew at each step. Fresh from the kernel, every page of them faults
    again: about 5 percent of the time of a small training step. Does nothing where the C library is not glibc.
    """
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # numbers from malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_max, 0)  # large blocks come from the heap, which stays
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_arena_max, 1)  # threads' own heaps are too small for large blocks
    except (OSError, AttributeError):
        pass
