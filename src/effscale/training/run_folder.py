"""The folder of a run: what was asked for, with what, and what came out."""

import dataclasses
import datetime
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from effscale.locks import LockedError, ProcessLock
from effscale.parallel import on_first
from effscale.training.paths import local_path
from effscale.training.serialize import differences, to_json, write_atomic, write_json

logger = logging.getLogger(__name__)

LOCK = ".lock"
_PACKAGES = ("effscale", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Names of a run's files. ``create`` makes a new folder or, if told to resume, opens one, for one process at a time.

    Attributes:
        path: The folder, absolute.
    """

    path: pathlib.Path
    _lock: ProcessLock | None = dataclasses.field(default=None, repr=False, compare=False)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        name: str | None = None,
        root: str | os.PathLike[str] = "runs",
        config: Any = None,
        data: Mapping[str, Any] | None = None,
        resume: bool = False,
    ) -> "RunFolder":
        """Make the folder of a new run, and write ``config.json`` into it.

        The folder is locked until `close`, the end of a ``with`` block or the end of the process, so that no second process writes there at the same
        time. With several processes, process 0 does this and the others learn what came of it.

        Args:
            path: The folder; None chooses ``<root>/<name>/<time>``.
            name: Name of the experiment, needed without ``path``.
            root: Where runs lie.
            config: The run's config (dataclass or mapping).
            data: What the run learns from, as names of its parts and plain values that change with their content, such as digests. It is kept in
                ``config.json``, and a resume with other values for a part is refused.
            resume: Open an existing folder to go on; its ``config.json`` is left as it is, but for new parts of ``data``.

        Returns:
            The folder.

        Raises:
            FileExistsError: The folder holds something and ``resume`` is not set.
            FileNotFoundError: ``resume`` is set and there is no such folder, or it has no ``config.json``.
            LockedError: Another process is writing the folder.
            ValueError: Neither ``path`` nor ``name`` is given, ``resume`` without ``path``, or a path that is a URL; or the
                run to resume has learned from other data.
        """
        if path is None:
            if resume:
                raise ValueError("resume=True needs the path of the run to go on with")
            if name is None:
                raise ValueError("give the path of the run folder, or the name of the experiment")
            path = _unused(local_path(root) / name)
        where, data = local_path(path), to_json(data or {})
        opened = on_first(
            lambda: _resume(cls(where), data) if resume else _start(cls(where), config, data)
        )
        return cls(where) if opened is None else opened

    def close(self) -> None:
        """Let other processes write the folder. A second call does nothing."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    @property
    def config_file(self) -> pathlib.Path:
        """``config.json``: the config, versions, git revision and devices."""
        return self.path / "config.json"

    @property
    def metrics_file(self) -> pathlib.Path:
        """``metrics.jsonl``: a line a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def results_file(self) -> pathlib.Path:
        """``results.json``: the named figures."""
        return self.path / "results.json"

    @property
    def report_file(self) -> pathlib.Path:
        """``report.md``: what a reader should know."""
        return self.path / "report.md"

    @property
    def checkpoints(self) -> pathlib.Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> pathlib.Path:
        """Folder of TensorBoard's events."""
        return self.path / "tensorboard"

    @property
    def figures(self) -> pathlib.Path:
        """Folder of figures; made at the first use."""
        folder = self.path / "figures"
        folder.mkdir(exist_ok=True)
        return folder

    def config(self) -> Any:
        """Return the config as it was written, in plain JSON values.

        Raises:
            ValueError: ``config.json`` is damaged.
        """
        return self._saved()["config"]

    def _saved(self) -> dict[str, Any]:
        try:
            saved = json.loads(self.config_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.config_file} cannot be read: {error}") from None
        if not isinstance(saved, dict) or "config" not in saved:
            raise ValueError(f"{self.config_file} cannot be read: it holds no config")
        return saved

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Write the named figures."""
        write_json(self.results_file, results)

    def results(self) -> dict[str, Any]:
        """Return the named figures."""
        return json.loads(self.results_file.read_text(encoding="utf-8"))

    def write_report(self, title: str, results: Mapping[str, Any], text: str = "") -> None:
        """Write ``report.md``: a title, some text, the table of results and the figures there are.

        Args:
            title: The heading.
            results: Rows of the table.
            text: Markdown put before the table.
        """
        rows = "\n".join(f"| {name} | {_shown(value)} |" for name, value in results.items())
        parts = [f"# {title}", text.strip(), f"| figure | value |\n|---|---|\n{rows}"]
        if (self.path / "figures").is_dir():
            images = sorted((self.path / "figures").glob("*.png"))
            parts += [f"![{image.stem}](figures/{image.name})" for image in images]
        write_atomic(self.report_file, "\n\n".join(part for part in parts if part) + "\n")


def check_unused(path: str | os.PathLike[str]) -> None:
    """Raise FileExistsError if a new run's folder holds something already.

    ``RunFolder.create`` asks this itself; a run that prepares for long may want the answer first.
    """
    folder = local_path(path)
    if folder.exists() and (
        not folder.is_dir() or any(entry.name != LOCK for entry in folder.iterdir())
    ):
        raise FileExistsError(
            f"{folder} already holds a run; choose another folder, or resume to go on with it"
        )


def check_resumable(path: str | os.PathLike[str]) -> None:
    """Raise FileNotFoundError if a folder holds no run to go on with; ``RunFolder.create`` asks this itself."""
    folder = pathlib.Path(path).resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; run without resume to start there")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json, so there is no telling which run it holds; restore that file, or start afresh: without "
            "resume (on the command line: without --resume), in a new folder (with another --out)"
        )


def _start(folder: RunFolder, config: Any, data: dict[str, Any]) -> RunFolder:
    check_unused(folder.path)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder = _locked(folder)
    try:
        check_unused(folder.path)  # another process may have been faster
        write_json(folder.config_file, {"config": to_json(config), "data": data, **environment()})
    except BaseException:
        folder.close()
        raise
    return folder


def _resume(folder: RunFolder, data: dict[str, Any]) -> RunFolder:
    check_resumable(folder.path)
    folder = _locked(folder)
    try:
        _check_data(folder, data)
    except BaseException:
        folder.close()
        raise
    return folder


def _check_data(folder: RunFolder, data: dict[str, Any]) -> None:
    """Compare the parts of the data that the run has learned from already, and keeps those that are new to it."""
    saved = folder._saved()
    known = saved.get("data") or {}
    found = [
        f"{name}: {there!r} there, {here!r} here"
        for part in data
        if part in known
        for name, (there, here) in differences(known[part], data[part], part).items()
    ]
    if found:
        raise ValueError(
            f"{folder.path} holds a run that learns from other data ({'; '.join(found)}); restore the files that it was started "
            "with, or start a new run in another folder"
        )
    if data.keys() - known.keys():
        if not known:
            logger.warning(
                "%s keeps no digests of its data, so that they cannot be compared with today's",
                folder.config_file,
            )
        write_json(folder.config_file, saved | {"data": known | data})


def _locked(folder: RunFolder) -> RunFolder:
    lock = ProcessLock(folder.path / LOCK, f"writing {folder.path}", reentrant=True)
    try:
        lock.acquire()
    except LockedError as error:
        raise LockedError(f"{error}; wait for it to end, or choose another folder") from None
    return dataclasses.replace(folder, _lock=lock)


def environment() -> dict[str, Any]:
    """Versions, git revision, machine and devices, as JSON values."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    devices = jax.devices()
    return {
        "versions": versions,
        "git_revision": git_revision(),
        "machine": {"platform": platform.platform(), "cpu_count": _usable_cpus()},
        "devices": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
        },
    }


def _usable_cpus() -> int | None:
    """Cores that this process may run on: fewer than the machine's where it is pinned."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def git_revision() -> str | None:
    """Revision of the source tree this package lies in, with ``+changes`` if it is modified; None outside of git."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(pathlib.Path(__file__).parent), *args]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=10
        ).stdout.strip()

    try:
        # Ask whether this file is tracked: an installed package may lie inside some other project's repository.
        git("ls-files", "--error-unmatch", pathlib.Path(__file__).name)
        return git("rev-parse", "HEAD") + (
            "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


def _unused(folder: pathlib.Path) -> pathlib.Path:
    """``folder/<time>``, with a number behind it if two runs start in one second; the same on all processes."""
    now = int(datetime.datetime.now().timestamp())
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        return folder / _time(int(multihost_utils.broadcast_one_to_all(np.int32(now))))
    path, number = folder / _time(now), 2
    while path.exists():
        path, number = folder / f"{_time(now)}-{number}", number + 1
    return path


def _time(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds).strftime("%Y%m%d-%H%M%S")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
