"""Files and folders that are written completely or not at all."""

import contextlib
import errno
import os
import pathlib
import shutil
import socket
from collections.abc import Iterator

from effscale.paths import local_path, output_folder


class DiskFullError(OSError):
    """The disk filled up while a file or folder was written; the previous contents are unchanged."""


@contextlib.contextmanager
def full_disk_errors(target: str | os.PathLike[str], advice: str = "") -> Iterator[None]:
    """Convert errors of a full disk or quota to one `DiskFullError` that names ``target``.

    Args:
        target: What is being written.
        advice: A sentence to add to the message.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(
            error.errno,
            f"the disk is full ({os.strerror(error.errno or errno.ENOSPC)}) while writing {os.fspath(target)!r}. "
            f"Free some space or choose a folder on another disk, then run again.{advice}",
        ) from error


@contextlib.contextmanager
def atomic_folder(
    target: str | os.PathLike[str], *, overwrite: bool = False
) -> Iterator[pathlib.Path]:
    """Yield a temporary folder next to ``target`` that replaces ``target`` if the block succeeds.

    The files are flushed to disk before the folder is renamed, so neither an exception nor a power
    cut leaves a half-written folder under the final name. The next writer removes temporary folders
    left by a killed process.

    Args:
        target: The folder to create.
        overwrite: Replace an existing folder. It stays in place until the new one is complete.

    Raises:
        FileExistsError: ``target`` exists and ``overwrite`` is false.
        DiskFullError: The disk or a quota is full.
        ValueError: ``target`` is a URL.
    """
    target = local_path(target).absolute()
    if target.exists() and not overwrite:
        raise FileExistsError(
            f"{str(target)!r} already exists. Choose another folder, "
            "or pass overwrite=True to replace it."
        )
    temporary = target.parent / _temporary_name(target, "tmp")
    try:
        with full_disk_errors(target, " The incomplete files were removed."):
            output_folder(target.parent)
            _remove_leftovers(target)
            temporary.mkdir()
            yield temporary
            _sync(temporary)
            _publish(temporary, target, overwrite)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def atomic_file(target: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yield a temporary path next to ``target`` for a file that replaces ``target`` if the block succeeds.

    After a crash, or for a concurrent reader, the file has either the old content or the new one, never a mixture.
    Missing folders are created.

    Raises:
        DiskFullError: The disk or a quota is full.
        ValueError: ``target`` is a URL.
    """
    target = local_path(target)
    output_folder(target.parent)
    temporary = target.with_name(_temporary_name(target, "tmp"))
    try:
        with full_disk_errors(target):
            yield temporary
            flush(temporary)
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary_name(target: pathlib.Path, kind: str) -> str:
    return f".{target.name}.{kind}-{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"


def _remove_leftovers(target: pathlib.Path) -> None:
    prefixes = [f".{target.name}.{kind}-{socket.gethostname()}" for kind in ("tmp", "old")]
    for entry in target.parent.iterdir():
        prefix, _, rest = entry.name.rpartition("-")
        prefix, _, pid = prefix.rpartition("-")
        if prefix in prefixes and rest and pid.isdecimal() and not _alive(int(pid)):
            shutil.rmtree(entry, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync(folder: pathlib.Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def flush(path: pathlib.Path) -> None:
    """Flush a file, or the directory entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(temporary: pathlib.Path, target: pathlib.Path, overwrite: bool) -> None:
    aside = None
    if overwrite and target.exists():
        aside = target.parent / _temporary_name(target, "old")
        os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except OSError as error:
        if aside is not None:
            os.rename(aside, target)
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise FileExistsError(
                error.errno, "another process wrote this folder first", str(target)
            ) from error
        raise
    flush(target.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)
