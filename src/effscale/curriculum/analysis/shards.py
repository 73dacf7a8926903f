"""The files of finished shards, which a later run of the same analysis reuses."""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import socket
from collections.abc import Iterator
from typing import Any

from effscale import atomic
from effscale.curriculum.analysis.map import Columns, Shard
from effscale.locks import LockedError, ProcessLock
from effscale.paths import output_folder

KEY = b"effscale"
MARKER = "effscale-analysis.json"


class ShardFolder:
    """The finished shards of an analysis as Parquet files, ``00000.parquet`` and so on.

    A file has a column ``sample`` and one for each metric. It is written atomically, has checksums, and
    records its source and metrics.

    Args:
        folder: The folder of the files.
        identity: The source and metrics of the shards, as plain values.
    """

    def __init__(self, folder: pathlib.Path, identity: dict[str, Any]):
        self.folder, self.identity = folder, identity

    def path(self, shard: Shard) -> pathlib.Path:
        """Return the file of a shard."""
        return self.folder / f"{shard.index:05d}.parquet"

    def write(self, shard: Shard, columns: Columns) -> None:
        """Write a finished shard."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table(dict(columns)).replace_schema_metadata({KEY: self._label(shard)})
        path = self.path(shard)
        with full_disk_errors(path), atomic.atomic_file(path) as temporary:
            pq.write_table(table, temporary, write_page_checksum=True)

    def is_finished(self, shard: Shard) -> bool:
        """Return whether the file of the shard exists, is intact and belongs to this analysis."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if None in self.identity["metrics"].values():
            return False  # a metric without a digest may have changed
        try:
            with pq.ParquetFile(self.path(shard), page_checksum_verification=True) as file:
                label = (file.schema_arrow.metadata or {}).get(KEY)
                return label == self._label(shard) and len(file.read()) == shard.stop - shard.start
        except (OSError, pa.ArrowException):
            return False

    def remove(self) -> None:
        """Remove the folder, the marker file last."""
        for path in self.folder.iterdir():
            if path.name != MARKER:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (self.folder / MARKER).unlink()
        # Another process may have claimed the folder in between.
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _label(self, shard: Shard) -> bytes:
        return json.dumps({**self.identity, **shard._asdict()}, sort_keys=True).encode()


@contextlib.contextmanager
def claimed(folder: pathlib.Path, identity: dict[str, Any]) -> Iterator[ShardFolder]:
    """Create the folder of an analysis, or open an existing one, for exclusive use by this process.

    A locked marker file identifies the folder, see ``effscale.locks``.

    Raises:
        FileExistsError: The place is taken by something else.
        LockedError: Another process is using the folder.
    """
    with full_disk_errors(folder):
        lock = _locked(folder)
    try:
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "identity": identity}
        with full_disk_errors(folder):
            (folder / MARKER).write_text(json.dumps(owner), encoding="utf-8")
        shards = ShardFolder(folder, identity)
        try:
            yield shards
        finally:
            # Keep nothing if no shard was finished.
            if folder.exists() and not any(folder.glob("*.parquet")):
                shards.remove()
    finally:
        lock.release()


def remove_leftovers(folder: pathlib.Path, identity: dict[str, Any]) -> None:
    """Remove the shards of a finished index whose process died before removing them."""
    if _owner(folder / MARKER).get("identity") != identity:
        return
    # A process that is using the folder removes it itself; a read-only folder is left.
    with contextlib.suppress(OSError, RuntimeError):
        lock = _locked(folder)
        try:
            ShardFolder(folder, identity).remove()
        finally:
            lock.release()


@contextlib.contextmanager
def full_disk_errors(path: pathlib.Path) -> Iterator[None]:
    """Convert errors of a full disk, including DuckDB's, to `DiskFullError`.

    Raises:
        DiskFullError: The disk or a quota is full.
    """
    import duckdb

    with atomic.full_disk_errors(path, " Finished shards are kept."):
        try:
            yield
        except duckdb.Error as error:
            # DuckDB stops when its files have filled nine tenths of the free space.
            texts = (os.strerror(errno.ENOSPC), "max_temp_directory_size")
            if any(text in str(error) for text in texts):
                raise OSError(errno.ENOSPC, str(error)) from error
            raise


def _locked(folder: pathlib.Path) -> ProcessLock:
    """Acquire the lock of the folder's marker."""
    path = folder / MARKER
    while True:
        if folder.exists() and not path.exists() and not _is_empty(folder):
            raise FileExistsError(
                f"{folder}: is where finished shards are kept, but contains something else. Move it "
                "away, or choose another folder for the index."
            )
        output_folder(folder)
        lock = ProcessLock(path, f"at work in {str(folder)!r}")
        try:
            lock.acquire()
        except FileNotFoundError:
            continue  # its owner has just removed it
        except LockedError as error:
            if not path.exists():
                continue
            raise LockedError(
                f"{error}. Wait for it to end, or choose another folder for the index."
            ) from None
        return lock


def _is_empty(folder: pathlib.Path) -> bool:
    try:
        return not any(folder.iterdir())
    except FileNotFoundError:
        return True
    except NotADirectoryError:
        return False


def _owner(marker: pathlib.Path) -> dict[str, Any]:
    try:
        owner = json.loads(marker.read_bytes())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}
