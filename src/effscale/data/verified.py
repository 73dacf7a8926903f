"""Checks of whole files that run once per machine.

Reading a terabyte to compare its digest takes a quarter of an hour, so a check that has passed is remembered until the
file changes. What is remembered is a mark, an empty file in the user's cache folder. Its name is a digest of the file's
path, size, times and inode and of what was checked: a mark can neither be damaged nor be taken for that of another state,
and processes that leave the same one at the same time agree.
"""

import contextlib
import logging
import os
import pathlib
from collections.abc import Callable, Mapping

from effscale.data.cache import request_key
from effscale.user_cache import cache_folder

logger = logging.getLogger(__name__)

# A smaller file is read about as fast as a mark is found on a network file system, and leaves none.
MIN_BYTES = 1 << 24


def verify_once(
    path: pathlib.Path, check: Callable[[], object], promises: Mapping[str, str | int]
) -> None:
    """Runs a check of a file, unless it has passed on this machine and the file is the same since.

    Changes are told by the file's size, inode and times. Where the cache folder cannot be written, the check runs
    each time.

    Args:
        path: The file.
        check: Reads the file and raises an exception unless it is as promised.
        promises: What the check compares the file with, in plain values.
    """
    mark = _mark(path, promises)
    if mark is None or path.stat().st_size < MIN_BYTES:
        check()
    elif not os.path.exists(mark):
        logger.info("verifying %s, once on this machine", path)
        check()
        # Not if the file changed while it was read.
        if mark == _mark(path, promises):
            with contextlib.suppress(OSError):
                mark.parent.mkdir(parents=True, exist_ok=True)
                mark.touch()


def _mark(path: pathlib.Path, promises: Mapping[str, str | int]) -> pathlib.Path | None:
    try:
        folder = cache_folder("verified")
    except RuntimeError:  # a user without a home
        return None
    stat = path.stat()
    state = [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
    request = {"path": os.path.realpath(path), "state": state, "promises": dict(promises)}
    return folder / request_key(request)
