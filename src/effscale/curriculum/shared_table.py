"""Tables of numbers shared by the processes of a machine."""

import errno
import os
import pathlib
import tempfile
import weakref
from typing import Any

import numpy as np
from jaxtyping import Shaped

from effscale.data import DiskFullError

# Tables up to this size are pickled with their content and need no file.
MAX_PICKLED_BYTES = 1 << 24


class SharedTable:
    """A table that is written once and then read by this process and its workers.

    A large table is a memory-mapped temporary file (in ``TMPDIR``). Its pickle contains only the file's name, so worker
    processes map the same pages and copy nothing. The file is removed together with the table in the process that created it,
    so a pickled table can be used only on the same machine while that process runs. A small table is pickled as a whole.

    Attributes:
        values: The numbers; zero at first, and read-only once pickled.

    >>> import pickle
    >>> table = SharedTable(3, np.dtype(np.uint8))
    >>> table.values[:] = [5, 6, 7]
    >>> pickle.loads(pickle.dumps(table)).values
    array([5, 6, 7], dtype=uint8)
    """

    values: Shaped[np.ndarray, " n"]

    def __init__(self, length: int, dtype: np.dtype):
        """Create a table.

        Args:
            length: The number of entries.
            dtype: The type of the entries.

        Raises:
            DiskFullError: The disk has no room for the file.
        """
        self._path: str | None = None
        size = length * dtype.itemsize
        if size <= MAX_PICKLED_BYTES:
            self.values = np.zeros(length, dtype)
            return
        descriptor, self._path = tempfile.mkstemp(prefix="effscale-", suffix=".table")
        remove = weakref.finalize(self, _remove, self._path, os.getpid())
        try:
            _allocate(descriptor, size)
        except OSError as error:
            remove()
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DiskFullError(
                error.errno,
                f"no room for a table of {size / 1e9:.1f} GB in {tempfile.gettempdir()!r}. "
                "Set TMPDIR to a folder on another disk",
            ) from error
        finally:
            os.close(descriptor)
        # Not as a memmap, which would be pickled with its content if it is used separately.
        self.values = np.asarray(np.memmap(self._path, dtype, mode="r+", shape=(length,)))

    def __getstate__(self) -> dict[str, Any]:
        if self._path is None:
            return self.__dict__
        return {"_path": self._path, "dtype": self.values.dtype, "length": len(self.values)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._path = state["_path"]
        if self._path is None:
            self.values = state["values"]
            return
        try:
            mapped = np.memmap(self._path, state["dtype"], mode="r", shape=(state["length"],))
        except FileNotFoundError:
            raise FileNotFoundError(
                errno.ENOENT,
                "the process that created the curriculum has ended or is on another machine, so its table is not available. "
                "Call curriculum_rows in this process",
                self._path,
            ) from None
        self.values = np.asarray(mapped)


def _allocate(descriptor: int, size: int) -> None:
    """Reserve the space, as writing to a mapped file without room on the disk kills the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    for start in range(0, size, 1 << 20):
        os.write(descriptor, bytes(min(1 << 20, size - start)))


def _remove(path: str, owner: int) -> None:
    # A forked process runs finalizers too.
    if os.getpid() == owner:
        pathlib.Path(path).unlink(missing_ok=True)
