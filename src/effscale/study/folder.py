"""The run folder of a study: its options, checks before work begins, and what is said after a stop."""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from effscale.options import Options, PositiveInt, check
from effscale.parallel.peers import on_first
from effscale.paths import is_url
from effscale.training import MirrorError, RunFolder
from effscale.training.errors import StoppedBySignal
from effscale.training.mirror import OWNER
from effscale.training.run_folder import check_unused
from effscale.training.serialize import differences, to_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputPart(Options):
    """The output of a run; every config includes this part."""

    out: pathlib.Path | None = None
    """Run folder; the default is runs/<experiment>/<time>."""
    resume: bool = False
    """Resume the run in --out: finished runs are kept, and the last one continues from its checkpoint."""
    mirror: str | None = None
    """URL of a copy of the run folder, updated every minute, such as s3://bucket/runs/a. effscale.training.fetch_run copies it back."""

    def __post_init__(self):
        super().__post_init__()
        check(
            self,
            self.mirror is None or is_url(self.mirror),
            "mirror",
            "a URL such as s3://bucket/runs/a",
        )
        resumable = not (self.resume and self.out is None)
        check(self, resumable, "resume", "set together with --out, the folder to resume")


OUTPUT = tuple(field.name for field in dataclasses.fields(OutputPart))
"""Fields that can change when a run is resumed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyPart(OutputPart):
    """What every study has as options."""

    arms: tuple[str, ...] | None = None
    """The arms to train; None trains all. An arm that another needs must be among them."""
    seeds: PositiveInt = 3
    """Number of runs of each arm. Seeds 0, 1, ... decide everything random."""
    jobs: PositiveInt = 1
    """Number of processes, each pinned to its share of the cores, that the arms are divided over."""


FREE = (*(field.name for field in dataclasses.fields(StudyPart)), "cache")
"""Fields of a study that can change when it is resumed."""


def check_folder(config: OutputPart, free: Sequence[str]) -> None:
    """Check that ``config.out`` is unused or, with ``config.resume``, contains a run of the same config that no
    process is writing.

    Args:
        config: Config of the experiment.
        free: Fields that may differ.

    Raises:
        ValueError: The folder has another config.
        FileExistsError: The folder contains a run and ``resume`` is not set.
        FileNotFoundError: There is no run to resume.
        LockedError: Another process is writing to the folder.
    """
    if not config.resume:
        if config.out is not None:
            on_first(lambda: check_unused(config.out))
        return
    with RunFolder.create(config.out, resume=True) as folder:
        saved = folder.config()
    if config.mirror is None and (folder.path / OWNER).exists():
        print(
            f"warning: the copy of {folder.path} is not updated, because --mirror is not set",
            file=sys.stderr,
        )
    found = [
        f"{name}: {there!r} saved, {here!r} given"
        for name, (there, here) in differences(saved, to_json(config)).items()
        if name.partition(".")[0] not in free
    ]
    if found:
        raise ValueError(
            f"{folder.path}: has another config ({'; '.join(found)}). Resume with the saved values, or start a new run folder"
        )


def open_folder(config: OutputPart, name: str, data: Mapping[str, Any] | None = None) -> RunFolder:
    """Create the ``RunFolder`` of a run, or open it to resume.

    Args:
        config: Config of the experiment.
        name: Name of the experiment.
        data: Digests of the run's data, as for ``RunFolder.create``.
    """
    return RunFolder.create(
        config.out,
        name=name,
        config=config,
        data=data,
        resume=config.resume,
        mirror=config.mirror,
    )


@contextlib.contextmanager
def resumable(folder: RunFolder) -> Iterator[None]:
    """Context in which a stop by a signal says how to resume, and in which the run folder is released if the block fails.

    Args:
        folder: The ``RunFolder``.
    """
    try:
        yield
    except StoppedBySignal as stop:
        release(folder)
        message = f"{stop}; to resume, use --out {folder.path} --resume"
        raise StoppedBySignal(message, stop.signal) from None
    except BaseException:
        release(folder)
        raise


def release(folder: RunFolder) -> None:
    """Close the run folder when a run has failed; a copy that cannot be completed is only a warning."""
    try:
        folder.close()
    except MirrorError as error:
        print(f"warning: {error}", file=sys.stderr)
