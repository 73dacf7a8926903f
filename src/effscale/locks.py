"""Locks between processes: on an entry of a cache, on a folder of shards, on a run."""

import contextlib
import json
import logging
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import Any

import filelock

logger = logging.getLogger(__name__)


class LockedError(RuntimeError):
    """Another process holds a lock; the message names that process if it is known."""


class ProcessLock:
    """A lock that the operating system frees when the process that holds it ends, however it ends.

    The lock file records its holder and is left in place: a file that nobody holds locks nothing. On a file system that has no locks, ``acquire``
    logs a warning and goes on without one.

    Args:
        path: The lock file; its folder is made if it is missing.
        purpose: What the holder is doing, for messages, such as "writing runs/a".
        reentrant: Let this process take the lock again while it holds it; each ``acquire`` then needs its ``release``. By default a second lock of
            the same process is refused as another process's would be.
    """

    def __init__(self, path: str | os.PathLike[str], purpose: str, *, reentrant: bool = False):
        self.path, self.purpose = pathlib.Path(path), purpose
        # A soft lock, filelock's substitute where flock is missing, would outlive a process that is killed.
        self._lock = filelock.FileLock(
            self.path, thread_local=False, is_singleton=reentrant, fallback_to_soft=False
        )

    def acquire(self, *, wait: bool = False) -> None:
        """Takes the lock.

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
        with contextlib.suppress(OSError):  # Windows lets nobody write to a locked file
            self.path.write_text(json.dumps(self._record() | holder), encoding="utf-8")

    def release(self) -> None:
        """Frees the lock if it is held."""
        self._lock.release()

    def _record(self) -> dict[str, Any]:
        """What the lock file says; its owner may keep more there than the holder."""
        try:
            record = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}


@contextlib.contextmanager
def locked(target: pathlib.Path, purpose: str) -> Iterator[None]:
    """Waits for the lock that belongs to a file or folder, a hidden file beside it, and holds it."""
    lock = ProcessLock(target.parent / f".{target.name}.lock", purpose)
    lock.acquire(wait=True)
    try:
        yield
    finally:
        lock.release()
