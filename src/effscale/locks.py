"""Locks between processes: for a cache entry, a folder of shards, or a run."""

import contextlib
import json
import logging
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import Any

import filelock

from effscale.paths import output_folder

logger = logging.getLogger(__name__)


class LockedError(RuntimeError):
    """Another process holds the lock; the message identifies that process if it is known."""


class ProcessLock:
    """A lock that the operating system releases when the process that holds it ends, even if it is killed.

    The lock file records its holder and is never deleted; a leftover file that no process holds does not lock anything.
    On a file system without locks, ``acquire`` logs a warning and continues without a lock.

    Args:
        path: The lock file; its folder is created if it is missing.
        purpose: What the holder is doing, used in messages, such as "writing runs/a".
        reentrant: Let this process acquire the lock again while it holds it; each ``acquire`` then needs its own ``release``.
            By default, a second lock in the same process is refused like one in another process.
    """

    def __init__(self, path: str | os.PathLike[str], purpose: str, *, reentrant: bool = False):
        self.path, self.purpose = pathlib.Path(path), purpose
        # A soft lock, filelock's fallback where flock is missing, would survive a process that is killed.
        self._lock = filelock.FileLock(
            self.path, thread_local=False, is_singleton=reentrant, fallback_to_soft=False
        )

    def acquire(self, *, wait: bool = False) -> None:
        """Acquire the lock.

        Args:
            wait: Wait until the lock is free.

        Raises:
            LockedError: Another process holds the lock, and ``wait`` is false.
            FileNotFoundError: Another process has just removed the folder of the lock file.
        """
        try:
            self._lock.acquire(blocking=wait)
        except filelock.Timeout:
            holder = self._record()
            known = f" (pid {holder['pid']} on {holder.get('host')})" if "pid" in holder else ""
            raise LockedError(f"another process{known} is {self.purpose}") from None
        except FileNotFoundError:
            raise
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s), so nothing stops another process from %s at the same time",
                self.path, error, self.purpose,
            )  # fmt: skip
            return
        holder = {"pid": os.getpid(), "host": socket.gethostname()}
        with contextlib.suppress(OSError):  # Windows does not allow writing to a locked file
            self.path.write_text(json.dumps(self._record() | holder), encoding="utf-8")

    def release(self) -> None:
        """Release the lock if it is held."""
        self._lock.release()

    def _record(self) -> dict[str, Any]:
        """Return the contents of the lock file; its owner may store more there than the holder."""
        try:
            record = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}


@contextlib.contextmanager
def locked(target: pathlib.Path, purpose: str) -> Iterator[None]:
    """Hold the lock of a file or folder, a hidden file next to it, waiting until it is free."""
    if not target.parent.exists():
        output_folder(target.parent)
    lock = ProcessLock(target.parent / f".{target.name}.lock", purpose)
    lock.acquire(wait=True)
    try:
        yield
    finally:
        lock.release()
