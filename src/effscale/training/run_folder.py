"""The folder of a run: config, environment, metrics and results."""

import dataclasses
import datetime
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from effscale.locks import LockedError, ProcessLock
from effscale.parallel.peers import on_first
from effscale.paths import local_path, output_folder
from effscale.training.errors import StoppedBySignal
from effscale.training.mirror import MirrorError, RunMirror
from effscale.training.serialize import differences, to_json, write_atomic, write_json

logger = logging.getLogger(__name__)

LOCK = ".lock"
_PACKAGES = ("effscale", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run folder. ``create`` makes a new folder or opens one to resume; only one process can use it at a time.

    Attributes:
        path: The absolute path of the folder.
    """

    path: pathlib.Path
    _lock: ProcessLock | None = dataclasses.field(default=None, repr=False, compare=False)
    _mirror: RunMirror | None = dataclasses.field(default=None, repr=False, compare=False)

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
        mirror: str | None = None,
    ) -> "RunFolder":
        """Create the folder of a new run and write ``config.json`` into it, or open the folder of a run to resume.

        The folder is locked until `close`, the end of a ``with`` block or the end of the process, so that no other process writes
        to it at the same time. With several processes, process 0 does this and shares the outcome with the others.

        Args:
            path: The folder; None chooses ``<root>/<name>/<time>``.
            name: The name of the experiment; required without ``path``.
            root: The parent folder of runs.
            config: The run's config (dataclass or mapping).
            data: The training data: the names of its parts, with plain values that change with their content, such as
                digests. It is saved in ``config.json``, and resuming with different values raises an error.
            resume: Whether to open an existing folder and continue. Its ``config.json`` is not changed, except for new
                parts of ``data``.
            mirror: The URL of a copy to keep up to date until `close`, such as ``s3://bucket/runs/a``. The copy is updated
                every minute; see `RunMirror`, and `fetch_run` for the way back.

        Returns:
            The folder.

        Raises:
            FileExistsError: The folder is not empty and ``resume`` is False.
            FileNotFoundError: ``resume`` is True and the folder does not exist or has no ``config.json``.
            ImportError: The package for the store of ``mirror`` is missing.
            LockedError: Another process is writing to the folder.
            MirrorError: The store of ``mirror`` cannot be reached.
            ValueError: Neither ``path`` nor ``name`` is given; ``resume`` is True without ``path``; ``path`` is a URL; or the
                run to resume was trained on different data.
        """
        if path is None:
            if resume:
                raise ValueError("resume=True needs the path of the run to resume")
            if name is None:
                raise ValueError("pass path, the run folder, or name, the name of the experiment")
            path = _unused(local_path(root) / name)
        where, data = local_path(path).resolve(), to_json(data or {})
        opened = on_first(
            lambda: (
                _resume(cls(where), data, mirror)
                if resume
                else _start(cls(where), config, data, mirror)
            )
        )
        return cls(where) if opened is None else opened

    def close(self) -> None:
        """Bring the copy up to date and release the lock of the folder. A second call does nothing, unless the copy failed.

        Raises:
            MirrorError: The copy is incomplete.
        """
        try:
            if self._mirror is not None:
                self._mirror.close()
        finally:
            if self._lock is not None:
                self._lock.release()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: Any, *exception: Any) -> None:
        try:
            self.close()
        except MirrorError as error:
            if kind is None:
                raise
            logger.warning("%s", error)  # the error in the block is more important

    @property
    def config_file(self) -> pathlib.Path:
        """``config.json``: the config, versions, git revision and devices."""
        return self.path / "config.json"

    @property
    def metrics_file(self) -> pathlib.Path:
        """``metrics.jsonl``: one line per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def results_file(self) -> pathlib.Path:
        """``results.json``: the results by name."""
        return self.path / "results.json"

    @property
    def report_file(self) -> pathlib.Path:
        """``report.md``: a summary of the run."""
        return self.path / "report.md"

    @property
    def checkpoints(self) -> pathlib.Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> pathlib.Path:
        """The folder of the TensorBoard events."""
        return self.path / "tensorboard"

    @property
    def figures(self) -> pathlib.Path:
        """The folder of the figures, created on first use."""
        folder = self.path / "figures"
        folder.mkdir(exist_ok=True)
        return folder

    def config(self) -> Any:
        """Return the config as written, in plain JSON values.

        Raises:
            ValueError: ``config.json`` is damaged.
        """
        return self._saved()["config"]

    def _saved(self) -> dict[str, Any]:
        try:
            saved = json.loads(self.config_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.config_file}: cannot be read ({error})") from None
        if not isinstance(saved, dict) or "config" not in saved:
            raise ValueError(f"{self.config_file}: has no config")
        if not isinstance(saved.get("data") or {}, dict):
            raise ValueError(f"{self.config_file}: data must be an object, got {saved['data']!r}")
        return saved

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Write ``results.json``."""
        write_json(self.results_file, results)

    def results(self) -> dict[str, Any]:
        """Read ``results.json``."""
        return json.loads(self.results_file.read_text(encoding="utf-8"))

    def write_report(self, title: str, results: Mapping[str, Any], text: str = "") -> None:
        """Write ``report.md``: a title, a text, the table of results and the figures that exist.

        Args:
            title: The heading.
            results: The rows of the table.
            text: Markdown to put before the table.
        """
        rows = "\n".join(f"| {name} | {_shown(value)} |" for name, value in results.items())
        parts = [f"# {title}", text.strip(), f"| figure | value |\n|---|---|\n{rows}"]
        if (self.path / "figures").is_dir():
            images = sorted((self.path / "figures").glob("*.png"))
            parts += [f"![{image.stem}](figures/{image.name})" for image in images]
        write_atomic(self.report_file, "\n\n".join(part for part in parts if part) + "\n")


def check_unused(path: str | os.PathLike[str]) -> None:
    """Raise FileExistsError if the folder of a new run already contains something.

    ``RunFolder.create`` does this itself; call it earlier if a run needs a long preparation.
    """
    folder = local_path(path).resolve()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: is not a folder. Choose another place for the run.")
    if folder.exists() and any(entry.name != LOCK for entry in folder.iterdir()):
        raise FileExistsError(
            f"{folder}: already contains a run. Choose another folder, or resume it."
        )


def check_resumable(path: str | os.PathLike[str]) -> None:
    """Raise FileNotFoundError if a folder contains no run to resume. ``RunFolder.create`` does this itself."""
    folder = local_path(path).resolve()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: does not exist. Run without resume to start a new run there."
        )
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder}: has no config.json, so the run in it is unknown. Restore that file, or start a new run without "
            "resume (on the command line: without --resume) in a new folder (with another --out)."
        )


def _start(folder: RunFolder, config: Any, data: dict[str, Any], mirror: str | None) -> RunFolder:
    check_unused(folder.path)
    folder = _locked(folder)
    try:
        check_unused(folder.path)  # another process may have created a run meanwhile
        write_json(folder.config_file, {"config": to_json(config), "data": data, **environment()})
        try:
            return _mirrored(folder, mirror)
        except BaseException:
            folder.config_file.unlink()  # the folder is unused
            raise
    except BaseException:
        folder.close()
        raise


def _resume(folder: RunFolder, data: dict[str, Any], mirror: str | None) -> RunFolder:
    check_resumable(folder.path)
    folder = _locked(folder)
    try:
        _check_data(folder, data)
        return _mirrored(folder, mirror)
    except BaseException:
        folder.close()
        raise


def _mirrored(folder: RunFolder, url: str | None) -> RunFolder:
    mirror = None if url is None else RunMirror(folder.path, url, every=60.0)
    return dataclasses.replace(folder, _mirror=mirror)


def _check_data(folder: RunFolder, data: dict[str, Any]) -> None:
    """Compare the data with that of the run so far, and record new parts."""
    saved = folder._saved()
    known = saved.get("data") or {}
    found = [
        f"{name}: {there!r} in the folder, {here!r} now"
        for part in data
        if part in known
        for name, (there, here) in differences(known[part], data[part], part).items()
    ]
    if found:
        raise ValueError(
            f"{folder.path}: the run was trained on different data ({'; '.join(found)}). Restore the files that it was started "
            "with, or start a new run in another folder."
        )
    if data.keys() - known.keys():
        if not known:
            logger.warning(
                "%s has no digests of its data, so the data cannot be compared with the current data",
                folder.config_file,
            )
        write_json(folder.config_file, saved | {"data": known | data})


def _locked(folder: RunFolder) -> RunFolder:
    lock = ProcessLock(output_folder(folder.path) / LOCK, f"writing {folder.path}", reentrant=True)
    try:
        lock.acquire()
    except LockedError as error:
        raise LockedError(f"{error}. Wait for it to end, or choose another folder.") from None
    return dataclasses.replace(folder, _lock=lock)


def environment() -> dict[str, Any]:
    """Return versions, git revision, machine and devices, as JSON values."""
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
    """Return the number of cores this process may use, which is smaller than the machine's if it is pinned."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def git_revision() -> str | None:
    """Return the git revision of this package's source tree, with ``+changes`` if it is modified; None outside git."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(pathlib.Path(__file__).parent), *args]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=10
        ).stdout.strip()

    try:
        # Check that this file is tracked: an installed package may be inside another project's repository.
        git("ls-files", "--error-unmatch", pathlib.Path(__file__).name)
        return git("rev-parse", "HEAD") + (
            "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


def _unused(folder: pathlib.Path) -> pathlib.Path:
    """Return ``folder/<time>``, with a number appended if two runs start in the same second; the same on all processes."""
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


def once(
    place: pathlib.Path, train: Callable[[], dict[str, Any]], *, mark: str = "done.json"
) -> dict[str, Any]:
    """Do the work of a folder, or read its result if it is finished.

    Args:
        place: The folder; its checkpoints are removed at the end.
        train: Does the work, or continues it, and returns its metrics.
        mark: The file with the result, which is written last.

    Returns:
        The metrics, with ``seconds`` and ``cpu_seconds`` (over all threads) of all calls that finished the work or were
        stopped by a signal during it, with compilations and evaluations. Calls that were killed are not counted.
    """
    done, earlier = place / mark, place / f"spent-{mark}"
    on_first(lambda: place.mkdir(parents=True, exist_ok=True))
    if done.is_file():
        return _read(done)
    first = jax.process_index() == 0  # only the first of several processes writes
    before = _read(earlier) if earlier.is_file() else {}
    clocks = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}
    began = {name: clock() for name, clock in clocks.items()}
    spent = lambda: {n: before.get(n, 0.0) + clock() - began[n] for n, clock in clocks.items()}
    try:
        metrics = train() | spent()
    except StoppedBySignal:
        if first:
            write_json(earlier, spent())
        raise

    def finish() -> None:
        number = lambda x: None if isinstance(x, float) and np.isnan(x) else x  # JSON has no NaN
        write_json(done, {name: number(value) for name, value in metrics.items()})
        earlier.unlink(missing_ok=True)
        # Not needed by finished work, and three times the size of the model.
        shutil.rmtree(place / "checkpoints", ignore_errors=True)

    on_first(finish)
    return metrics


def _read(path: pathlib.Path) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8"))
    return {name: float("nan") if value is None else value for name, value in values.items()}
