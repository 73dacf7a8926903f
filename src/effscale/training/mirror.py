"""Mirror a run folder to an object store during the run, and fetch it back."""

import atexit
import json
import logging
import os
import pathlib
import socket
import threading
import uuid
from collections.abc import Iterator
from typing import Any

from effscale.atomic import atomic_folder
from effscale.extras import missing
from effscale.paths import local_path
from effscale.training.checkpoint_files import DELETED, TEMPORARY, WRITING, is_step_folder
from effscale.training.manifest import MANIFEST
from effscale.training.metrics import Values
from effscale.training.serialize import write_json

logger = logging.getLogger(__name__)

OWNER = "mirror.json"
"""Identifies the run and the process that writes the copy."""

_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs"}
_PARTIAL = (TEMPORARY, DELETED, WRITING)


class MirrorError(RuntimeError):
    """A mirror is not up to date, or another process has taken it over."""


class RunMirror:
    """A mirror of a run folder in a store that fsspec supports, such as ``s3://`` or ``gs://``; a ``MetricsWriter`` for ``fit``.

    ``RunFolder.create(..., mirror=url)`` makes one with ``every=60``, which needs no writer. Use the class itself to choose when
    copies are made.

    Each ``flush``, which ``fit`` calls before a checkpoint, copies changes in the background: small files as a whole, and
    finished checkpoints, each with its manifest last, so that an incomplete copy is never taken for a checkpoint. Metrics go
    first and then the oldest files, so that a copy that was cut short has the records of its checkpoints, and what a file such
    as ``done.json`` vouches for. Checkpoints that the run deletes are deleted from the store too. An unreachable store does not stop the run: the next copy tries
    again, and only ``close`` raises an error if something is still missing. `fetch_run` copies the mirror back.

    Stores have no locks. A process that opens a mirror writes its name into ``mirror.json``, in the folder and in the store; if it
    later finds another name there, it stops copying and raises a `MirrorError`. So if two processes resume the same run,
    the later one keeps the mirror. A folder that is older than the copy is refused.

    Args:
        folder: The run folder, local or on a file system shared by all hosts. With several processes, create a mirror
            only on process 0.
        url: The place of the copy, such as ``s3://bucket/runs/a``.
        checkpoints: Whether to copy checkpoints. Use False if they are written to a bucket anyway.
        every: Seconds between copies that are made without a flush; None makes none. The last one is made by ``close``, at
            the latest when the program ends.

    Raises:
        FileExistsError: ``url`` contains a different run, something else, or a copy that was continued from another folder.
        ImportError: The package for this kind of store is missing.
        MirrorError: The store cannot be reached, or a ``mirror.json`` is damaged.
        ValueError: fsspec has no store for this kind of URL.

    >>> import tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp()); _ = (folder / "results.json").write_text("{}")
    >>> RunMirror(folder, f"memory://{folder.name}").close()
    >>> (fetch_run(f"memory://{folder.name}", folder / "back") / "results.json").read_text()
    '{}'
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        url: str,
        *,
        checkpoints: bool = True,
        every: float | None = None,
    ):
        self.folder, self.checkpoints = pathlib.Path(folder), checkpoints
        self._there = _Place(url)
        self._copied: dict[str, tuple[int, int]] = {}
        self._steps: set[str] | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._copying, self._closing = threading.Lock(), threading.Event()
        self._complete = False
        own = self.folder / OWNER
        owner, names = self._there.look()
        known = _record(own.read_bytes(), own) if own.exists() else {}
        run = known.get("run")
        if owner is None and names:
            raise FileExistsError(
                f"{url}: contains something other than a copy of a run. Choose another place."
            )
        if owner is not None and owner.get("run") != run:
            raise FileExistsError(
                f"{url}: contains the copy of a different run. Choose another place, or fetch_run and resume that run."
            )
        if owner is not None and owner["process"] not in (known["process"], known.get("previous")):
            raise FileExistsError(
                f"{url}: contains a later copy of this run, written by process {owner['process']}. Resume from that copy, with fetch_run, "
                "or choose another place."
            )
        self._name = {
            "run": run or uuid.uuid4().hex,
            "process": f"{os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex[:8]}",
            # If this process is killed before it reaches the store, the name there is still the previous one.
            "previous": None if owner is None else owner["process"],
        }
        write_json(own, self._name)
        try:
            self._there.put(own, OWNER)
        except Exception as error:
            write_json(own, known) if known else own.unlink()
            raise self._there.failure("written", error) from error
        self._timer: threading.Thread | None = None
        if every is not None:
            self._timer = threading.Thread(
                target=self._update_every, args=(every,), name="run-mirror-timer", daemon=True
            )
            self._timer.start()
            atexit.register(self._close_at_exit)

    def write(self, step: int, values: Values, timing: Values | None = None) -> None:
        """Do nothing, as the mirror copies the files of other writers."""

    def flush(self) -> None:
        """Copy changes in the background.

        Raises:
            MirrorError: Another process has taken over the mirror.
        """
        self._wait()
        if isinstance(self._error, MirrorError):
            raise self._error
        self._warn()
        self._thread = threading.Thread(target=self._update, name="run-mirror")
        self._thread.start()

    def close(self) -> None:
        """Copy changes, and wait until everything is copied. Once that succeeded, further calls do nothing.

        Raises:
            MirrorError: Something could not be copied, or another process has taken over the mirror.
        """
        if self._complete:
            return
        self._closing.set()
        atexit.unregister(self._close_at_exit)
        if self._timer is not None:
            self._timer.join()
        self._wait()
        if not isinstance(self._error, MirrorError):
            self._update()
        error = self._error
        if isinstance(error, MirrorError):
            raise error
        if error is not None:
            raise MirrorError(
                f"{self._there.url}: the copy of {self.folder} is incomplete: {error}"
            ) from error
        self._complete = True

    def _close_at_exit(self) -> None:
        try:
            self.close()
        except MirrorError as error:
            logger.warning("%s", error)

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _update_every(self, seconds: float) -> None:
        while not self._closing.wait(seconds):
            self._update()
            self._warn()
            if isinstance(self._error, MirrorError):  # taken over: close raises it
                return

    def _warn(self) -> None:
        if self._error is not None:
            logger.warning("%s is not up to date: %s", self._there.url, self._error)

    def _update(self) -> None:
        with self._copying:
            self._update_now()

    def _update_now(self) -> None:
        try:
            owner = self._there.owner()
            if owner != self._name:
                taker = owner["process"] if owner else "(unknown, mirror.json was removed)"
                raise MirrorError(
                    f"{self._there.url}: taken over by process {taker}. End one of the two runs."
                )
            self._copy()
            self._error = None
        except Exception as error:  # any error of the store's client
            self._error = error

    def _copy(self) -> None:
        steps = set()
        for path in sorted(_entries(self.folder), key=_order):
            name = path.relative_to(self.folder).as_posix()
            if is_step_folder(path):
                if self.checkpoints and (path / MANIFEST).exists():
                    steps.add(name)
                    self._copy_checkpoint(path, name)
            elif name != OWNER:
                self._copy_file(path, name)
        if self.checkpoints and steps != self._steps:
            for name in self._there.steps() - steps:
                self._there.remove_checkpoint(name)
                self._copied.pop(name, None)
            self._steps = steps

    def _copy_file(self, path: pathlib.Path, name: str) -> None:
        try:
            state = _state(path)
            if self._copied.get(name) != state:
                self._there.put(path, name)
                self._copied[name] = state
        except FileNotFoundError:
            if path.exists():
                raise  # the store's error: the run did not delete the file meanwhile

    def _copy_checkpoint(self, path: pathlib.Path, name: str) -> None:
        """Copy a checkpoint, unless the same one was copied before; one that was saved again has another manifest.

        If the run deletes it meanwhile, the copy has no manifest and so is not a valid checkpoint.
        """
        try:
            state = _state(path / MANIFEST)
            if self._copied.get(name) == state:
                return
            if name not in self._copied and self._there.has(f"{name}/{MANIFEST}"):
                self._copied[name] = state  # an earlier process of this run copied it
                return
            self._there.remove_checkpoint(name)  # what is left of another one
            files = [
                file for file in sorted(path.rglob("*")) if file.is_file() and file.name != MANIFEST
            ]
            for file in [*files, path / MANIFEST]:
                self._there.put(file, file.relative_to(self.folder).as_posix())
        except FileNotFoundError:
            if (path / MANIFEST).exists():
                raise
            return
        self._copied[name] = state


def fetch_run(url: str, folder: str | os.PathLike[str]) -> pathlib.Path:
    """Fetch a mirrored run, to resume it with ``RunFolder.create(folder, resume=True)``.

    Checkpoints without a manifest are left out. Those with one are verified when they are restored.

    Args:
        url: The URL to which a `RunMirror` copied the run.
        folder: The local folder, which must not exist yet.

    Raises:
        FileExistsError: The folder exists.
        FileNotFoundError: ``url`` contains no copy of a run.
        ImportError: The package for this kind of store is missing.
        MirrorError: The store cannot be reached; nothing is left in ``folder``.
    """
    target, there = local_path(folder), _Place(url)
    if target.exists():
        raise FileExistsError(
            f"{target}: already exists. Choose another folder, or resume the run in it."
        )
    owner, names = there.look()
    if owner is None:
        raise FileNotFoundError(f"{url}: contains no copy of a run")
    finished = {
        name.removesuffix(f"/{MANIFEST}") for name in names if name.endswith(f"/{MANIFEST}")
    }
    with atomic_folder(target) as temporary:
        for name in names:
            step = _step_of(name)
            if step is None or step in finished:
                there.get(name, temporary / name)
    return target


class _Place:
    """A folder in a store, accessed through fsspec."""

    def __init__(self, url: str):
        import fsspec

        self.url = url.rstrip("/")
        try:
            local = {"auto_mkdir": True} if self.url.startswith(("file:", "local:")) else {}
            self._store, self._root = fsspec.core.url_to_fs(
                self.url, use_listings_cache=False, **local
            )
        except ImportError as error:
            package = _PACKAGES.get(url.partition(":")[0])
            if package:
                raise missing(url, package) from error
            raise ImportError(f"{url} needs a package ({error})") from None
        except ValueError as error:
            raise ValueError(
                f"a mirror must be the URL of a store that fsspec supports, such as s3://bucket/runs/a, got {url!r} ({error})"
            ) from None

    def failure(self, what: str, error: Exception) -> MirrorError:
        return MirrorError(
            f"{self.url}: cannot be {what} ({type(error).__name__}: {error}). Check that the bucket exists, and that the credentials for it are "
            "where the client of its store looks for them, such as AWS_ACCESS_KEY_ID, or gcloud auth application-default login."
        )

    def owner(self) -> dict[str, Any] | None:
        try:
            text = self._store.cat_file(f"{self._root}/{OWNER}")
        except FileNotFoundError:
            return None
        return _record(text, f"{self.url}/{OWNER}")

    def look(self) -> tuple[dict[str, Any] | None, list[str]]:
        """Return the owner and all names, raising an error that says what to do if the store cannot be reached."""
        try:
            return self.owner(), self.names()
        except MirrorError:
            raise
        except Exception as error:  # any error of the client: credentials, permissions, network
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
        """Remove a checkpoint, its manifest first, so that a partially removed one is not a valid checkpoint."""
        if self.has(f"{name}/{MANIFEST}"):
            self._store.rm_file(f"{self._root}/{name}/{MANIFEST}")
        if self._store.exists(f"{self._root}/{name}"):
            self._store.rm(f"{self._root}/{name}", recursive=True)


def _record(text: bytes, where: pathlib.Path | str) -> dict[str, Any]:
    """Return the content of ``mirror.json``."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not all(
        isinstance(record.get(key), str) for key in ("run", "process")
    ):
        raise MirrorError(
            f"{where}: is damaged, so it is unknown which run the copy belongs to. To start a new copy, remove this file "
            "from the run folder and choose another place."
        )
    return record


def _order(path: pathlib.Path) -> tuple[bool, int, bool, str]:
    """Sort logs, which only grow, before everything else, and the rest by the time it was written; of files of one moment,
    the small ``.json`` ones vouch for others and come last.
    """
    is_log = path.suffix == ".jsonl" or ".tfevents." in path.name
    try:
        written = (path / MANIFEST if is_step_folder(path) else path).stat().st_mtime_ns
    except OSError:  # deleted meanwhile, or not finished
        written = 0
    return not is_log, written, path.suffix == ".json", path.name


def _state(path: pathlib.Path) -> tuple[int, int]:
    """Return what changes when a file is written again: its size and time."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _step_of(name: str) -> str | None:
    """Return the name of the checkpoint that an object belongs to."""
    path = pathlib.PurePosixPath(name)
    return next((str(parent) for parent in path.parents if is_step_folder(parent)), None)


def _entries(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield the files of a run and the folders of its checkpoints, without partial checkpoints, those set aside, and hidden
    files, which are locks and files that are being written.
    """
    for path in folder.iterdir():
        hidden = path.name.startswith(".") or path.name == "set_aside"
        if hidden or any(part in path.name for part in _PARTIAL):
            continue
        if path.is_dir() and not is_step_folder(path):
            yield from _entries(path)
        else:
            yield path
