"""A copy of a run folder in an object store, kept up to date while the run goes on, and brought back."""

import json
import logging
import os
import pathlib
import socket
import threading
import uuid
from collections.abc import Iterator
from typing import Any

from effscale.training.checkpoint_files import DELETED, TEMPORARY, WRITING, is_step_folder
from effscale.training.manifest import MANIFEST
from effscale.training.metrics import Values
from effscale.training.run_folder import LOCK
from effscale.training.serialize import write_json

logger = logging.getLogger(__name__)

OWNER = "mirror.json"
"""Says of which run the copy is, and which process writes it."""

_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs"}
_PARTIAL = (TEMPORARY, DELETED, WRITING)


class MirrorError(RuntimeError):
    """A copy is not up to date, or another process has taken it over."""


class RunMirror:
    """Copies a run folder to a store that fsspec knows, such as ``s3://`` or ``gs://``. It is a `MetricsWriter`, for ``fit``.

    Each ``flush``, which ``fit`` calls before a checkpoint, copies in the background what has changed: small files whole, and
    checkpoints that are finished, each with its manifest last, so that one without it does not count. Those that the run
    deletes are deleted there. A store that cannot be reached stops no run: the next flush tries again, and only ``close``
    raises an error if something is still missing. `fetch_run` brings the copy back.

    Stores have no locks. A process that opens a mirror writes its name into ``mirror.json``; one that later finds another
    name there copies no more and stops with a `MirrorError`. Of two processes that go on with one run, the later one keeps the copy.

    Args:
        folder: The run folder, local or on a file system that all hosts share. Of several processes, only process 0 has a mirror.
        url: Where the copy lies, such as ``s3://bucket/runs/a``.
        checkpoints: Whether to copy checkpoints; False where they are written to a bucket anyway.

    Raises:
        FileExistsError: ``url`` holds another run, or something else.
        ImportError: The package for such a store is missing.
        MirrorError: The store cannot be reached.

    >>> import tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp()); _ = (folder / "results.json").write_text("{}")
    >>> RunMirror(folder, f"memory://{folder.name}").close()
    >>> (fetch_run(f"memory://{folder.name}", folder / "back") / "results.json").read_text()
    '{}'
    """

    def __init__(self, folder: str | os.PathLike[str], url: str, *, checkpoints: bool = True):
        self.folder, self.checkpoints = pathlib.Path(folder), checkpoints
        self._there = _Place(url)
        self._copied: dict[str, tuple[int, int]] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        own = self.folder / OWNER
        owner, names = self._there.look()
        run = json.loads(own.read_text(encoding="utf-8"))["run"] if own.exists() else None
        if owner is None and names:
            raise FileExistsError(
                f"{url} holds something that is no copy of a run; choose another place"
            )
        if owner is not None and owner.get("run") != run:
            raise FileExistsError(
                f"{url} holds the copy of another run; choose another place, or fetch_run and resume that one"
            )
        process = f"{os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex[:8]}"
        self._name = {"run": run or uuid.uuid4().hex, "process": process}
        write_json(own, self._name)
        try:
            self._there.put(own, OWNER)
        except Exception as error:
            raise self._there.failure("written", error) from error

    def write(self, step: int, values: Values, timing: Values | None = None) -> None:
        """Do nothing: what is copied are the files that other writers write."""

    def flush(self) -> None:
        """Copy in the background what has changed.

        Raises:
            MirrorError: Another process has taken the copy over.
        """
        self._wait()
        if isinstance(self._error, MirrorError):
            raise self._error
        if self._error is not None:
            logger.warning("%s is not up to date: %s", self._there.url, self._error)
        self._thread = threading.Thread(target=self._update, name="run-mirror")
        self._thread.start()

    def close(self) -> None:
        """Copy what has changed, and wait until all is there.

        Raises:
            MirrorError: Something could not be copied, or another process has taken the copy over.
        """
        self._wait()
        if not isinstance(self._error, MirrorError):
            self._update()
        error = self._error
        if isinstance(error, MirrorError):
            raise error
        if error is not None:
            raise MirrorError(
                f"{self._there.url} is no complete copy of {self.folder}: {error}"
            ) from error

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _update(self) -> None:
        try:
            owner = self._there.owner()
            if owner != self._name:
                taker = owner["process"] if owner else "one that removed mirror.json"
                raise MirrorError(
                    f"{self._there.url} was taken over by process {taker}; end one of the two runs"
                )
            self._copy()
            self._error = None
        except Exception as error:  # whatever the client of the store raises
            self._error = error

    def _copy(self) -> None:
        steps = set()
        for path in _entries(self.folder):
            name = path.relative_to(self.folder).as_posix()
            if is_step_folder(path):
                if self.checkpoints and (path / MANIFEST).exists():
                    steps.add(name)
                    self._copy_checkpoint(path, name)
            elif name != OWNER:
                stat = path.stat()
                state = (stat.st_size, stat.st_mtime_ns)
                if self._copied.get(name) != state:
                    self._there.put(path, name)
                    self._copied[name] = state
        if self.checkpoints:
            for name in self._there.steps() - steps:
                self._there.remove_checkpoint(name)

    def _copy_checkpoint(self, path: pathlib.Path, name: str) -> None:
        """Copy a checkpoint, once; one that the run deletes meanwhile is left without a manifest, and does not count."""
        if name in self._copied or self._there.has(f"{name}/{MANIFEST}"):
            return
        files = [
            file for file in sorted(path.rglob("*")) if file.is_file() and file.name != MANIFEST
        ]
        try:
            for file in [*files, path / MANIFEST]:
                self._there.put(file, file.relative_to(self.folder).as_posix())
        except FileNotFoundError:
            if (path / MANIFEST).exists():
                raise
            return
        self._copied[name] = (0, 0)


def fetch_run(url: str, folder: str | os.PathLike[str]) -> pathlib.Path:
    """Bring the copy of a run back, to go on with it: ``RunFolder.create(folder, resume=True)``.

    Checkpoints without a manifest are left out. Those with one are verified when they are restored.

    Args:
        url: Where a `RunMirror` copied the run to.
        folder: The local folder, which must not exist yet.

    Raises:
        FileExistsError: The folder exists.
        FileNotFoundError: There is no copy at ``url``.
        ImportError: The package for such a store is missing.
        MirrorError: The store cannot be reached.
    """
    target, there = pathlib.Path(folder), _Place(url)
    if target.exists():
        raise FileExistsError(
            f"{target} exists; choose another folder, or resume the run that it holds"
        )
    owner, names = there.look()
    if owner is None:
        raise FileNotFoundError(f"{url} holds no copy of a run")
    finished = {
        name.removesuffix(f"/{MANIFEST}") for name in names if name.endswith(f"/{MANIFEST}")
    }
    for name in names:
        step = _step_of(name)
        if step is None or step in finished:
            there.get(name, target / name)
    return target


class _Place:
    """A folder of a store, by fsspec."""

    def __init__(self, url: str):
        import fsspec

        self.url = url.rstrip("/")
        try:
            self._store, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            package = _PACKAGES.get(url.partition(":")[0])
            needed = f"{package}: install it with pip install {package}" if package else "a package"
            raise ImportError(f"{url} needs {needed} ({error})") from None

    def failure(self, what: str, error: Exception) -> MirrorError:
        return MirrorError(
            f"{self.url} cannot be {what} ({type(error).__name__}: {error}); see that the bucket exists, and that the credentials for it are "
            "where the client of its store looks for them, such as AWS_ACCESS_KEY_ID, or gcloud auth application-default login"
        )

    def owner(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._store.cat_file(f"{self._root}/{OWNER}"))
        except FileNotFoundError:
            return None

    def look(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The owner and all names, with an error that says what to do where the store cannot be reached."""
        try:
            return self.owner(), self.names()
        except (
            Exception
        ) as error:  # whatever the client raises: of credentials, of rights, of the network
            raise self.failure("read", error) from error

    def names(self) -> list[str]:
        found = self._store.find(self._root)
        return sorted(name.removeprefix(self._root).lstrip("/") for name in found)

    def steps(self) -> set[str]:
        return {step for name in self.names() if (step := _step_of(name)) is not None}

    def has(self, name: str) -> bool:
        return self._store.exists(f"{self._root}/{name}")

    def put(self, source: pathlib.Path, name: str) -> None:
        self._store.put_file(str(source), f"{self._root}/{name}")

    def get(self, name: str, target: pathlib.Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        self._store.get_file(f"{self._root}/{name}", str(target))

    def remove_checkpoint(self, name: str) -> None:
        """Remove the manifest first, so that a checkpoint of which only half is removed does not count."""
        if self.has(f"{name}/{MANIFEST}"):
            self._store.rm_file(f"{self._root}/{name}/{MANIFEST}")
        self._store.rm(f"{self._root}/{name}", recursive=True)


def _step_of(name: str) -> str | None:
    """The checkpoint that an object belongs to, by name."""
    path = pathlib.PurePosixPath(name)
    return next((str(parent) for parent in path.parents if is_step_folder(parent)), None)


def _entries(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """The files of a run and, each as a whole, its checkpoints; without locks, what is half-written and what was set aside."""
    for path in sorted(folder.iterdir()):
        if path.name in (LOCK, "set_aside") or any(part in path.name for part in _PARTIAL):
            continue
        if path.is_dir() and not is_step_folder(path):
            yield from _entries(path)
        else:
            yield path
