"""The folder of a run: what was asked for, with what, and what came out."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from effscale.training.paths import local_path
from effscale.training.serialize import to_json, write_atomic, write_json

_PACKAGES = ("effscale", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Names of a run's files. ``create`` makes a new folder or, if told to resume, opens one.

    Attributes:
        path: The folder, absolute.
    """

    path: pathlib.Path

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        name: str | None = None,
        root: str | os.PathLike[str] = "runs",
        config: Any = None,
        resume: bool = False,
    ) -> "RunFolder":
        """Make the folder of a new run, and write ``config.json`` into it.

        Args:
            path: The folder; None chooses ``<root>/<name>/<time>``.
            name: Name of the experiment, needed without ``path``.
            root: Where runs lie.
            config: The run's config (dataclass or mapping).
            resume: Open an existing folder to go on; its ``config.json`` is left as it is.

        Returns:
            The folder.

        Raises:
            FileExistsError: The folder holds something and ``resume`` is not set.
            FileNotFoundError: ``resume`` is set and there is no such folder.
            ValueError: Neither ``path`` nor ``name`` is given, ``resume`` without ``path``, or a path that is a URL.
        """
        if path is None:
            if resume:
                raise ValueError("resume=True needs the path of the run to go on with")
            if name is None:
                raise ValueError("give the path of the run folder, or the name of the experiment")
            path = _unused(local_path(root) / name)
        folder = cls(local_path(path))
        if resume:
            if not folder.path.is_dir():
                raise FileNotFoundError(
                    f"{folder.path} does not exist; run without resume to start there"
                )
            return folder
        if jax.process_index() == 0:
            check_unused(folder.path)
            folder.path.mkdir(parents=True, exist_ok=True)
            write_json(folder.config_file, {"config": to_json(config), **environment()})
        return folder

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
        """The config as it was written, in plain JSON values."""
        return json.loads(self.config_file.read_text(encoding="utf-8"))["config"]

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Write the named figures."""
        write_json(self.results_file, results)

    def results(self) -> dict[str, Any]:
        """The named figures."""
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
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} already holds a run; choose another folder, or resume to go on with it"
        )


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
