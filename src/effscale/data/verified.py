"""File checks that run once per machine.

Comparing the digest of a terabyte takes a quarter of an hour, so a check that has passed is not repeated until the
file changes. A passed check is recorded as an empty marker file in the user's cache folder. The marker's name is a digest of
the file's path, size, times and inode and of what was checked. So a marker cannot be damaged or mistaken for that of another
state, and processes that create the same marker at the same time agree.
"""

import contextlib
import logging
import os
import pathlib
from collections.abc import Callable, Mapping

from effscale.data.cache import request_key
from effscale.user_cache import cache_folder

logger = logging.getLogger(__name__)

# Reading a smaller file is about as fast as looking up its marker on a network file system, so it gets none.
MIN_BYTES = 1 << 24


def verify_once(
    path: pathlib.Path, check: Callable[[], object], promises: Mapping[str, str | int]
) -> None:
    """Run a check of a file, unless it has passed on this machine and the file has not changed since.

    Changes are detected by the file's size, inode and times. If the cache folder is not writable, the check runs
    every time.

    Args:
        path: The file.
        check: Reads the file and raises an exception if it is not as promised.
        promises: What the check compares the file with, as plain values.
    """
    mark = _mark(path, promises)
    if mark is None or path.stat().st_size < MIN_BYTES:
        check()
    elif not os.path.exists(mark):
        logger.info("verifying %s, once on this machine", path)
        check()
        # Write no marker if the file changed during the check.
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
