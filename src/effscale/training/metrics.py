"""Metrics as plain numbers, and writers to JSONL files, TensorBoard or several outputs."""

import itertools
import json
import logging
import math
import os
import pathlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, Protocol, runtime_checkable

import jax

from effscale.atomic import full_disk_errors
from effscale.extras import require
from effscale.paths import local_path, output_folder
from effscale.training.serialize import write_atomic
from effscale.training.stages import Stages
from effscale.training.state import Counter

logger = logging.getLogger(__name__)

Values = Mapping[str, Any]
"""Metrics by name: numbers, and arrays of them (``fit`` passes nested lists)."""


def plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics as Python numbers, and arrays as (nested) lists of them. This waits for the device."""
    return {name: _plain(jax.device_get(value)) for name, value in metrics.items()}


def _plain(value: Any) -> Any:
    """Round float32 values to the digits that float32 distinguishes, to keep records short."""
    if isinstance(value, Counter):
        return int(value)
    if getattr(value, "ndim", 0):
        return [_plain(entry) for entry in value]
    number = value.item() if hasattr(value, "item") else value
    if (
        isinstance(number, float)
        and math.isfinite(number)
        and getattr(value, "dtype", None) == "float32"
    ):
        return float(str(value))
    return number


@runtime_checkable
class MetricsWriter(Protocol):
    """The interface of the writers that ``fit`` accepts."""

    def write(self, step: int, values: Values, timing: Values | None = None) -> None:
        """Write the metrics of a step; ``timing`` contains measured times, which differ between runs."""

    def flush(self) -> None:
        """Write everything to disk; called before each checkpoint."""

    def close(self) -> None:
        """Flush and release resources."""


class JsonlWriter:
    """A writer of JSON Lines, one object per record: ``{"step": 10, "loss": 2.3}``; a metric that is an array becomes a list.

    Measured times go to a second file, ``timing.jsonl`` in the same folder, so that two runs with the same numbers
    write the same bytes. A resumed run first removes records beyond the restored step, and any incomplete last line.
    It logs a warning if the file is missing, has unreadable lines, or has records although the run starts at step 0.
    NaN and infinities, which JSON does not have, are written as null.

    Args:
        path: The file; missing folders are created.
        resume_step: The step from which the run continues; later records are removed. None keeps all records.

    Raises:
        DiskFullError: The disk is full; by all methods.
        ValueError: ``path`` is a URL.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/metrics.jsonl"
    >>> writer = JsonlWriter(path); writer.write(1, {"loss": 2.5}); writer.close()
    >>> read_jsonl(path)
    [{'step': 1, 'loss': 2.5}]
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int | None = None):
        self.path = local_path(path)
        output_folder(self.path.parent)
        if resume_step and not self.path.exists():
            logger.warning("%s is missing: the records up to step %d are lost", path, resume_step)
        self.timing_path = self.path.with_name("timing.jsonl")
        for file in (self.path, self.timing_path):
            _repair(file, resume_step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115, closed by close()
        self._timing_file: IO[str] | None = None

    def write(self, step: int, values: Values, timing: Values | None = None) -> None:
        """Append a line, and a line of timing if given."""
        with full_disk_errors(self.path):
            self._file.write(_line(step, values))
            self._file.flush()  # so that a killed process loses no complete record
            if timing:
                if self._timing_file is None:
                    self._timing_file = open(self.timing_path, "a", encoding="utf-8")  # noqa: SIM115
                self._timing_file.write(_line(step, timing))

    def flush(self) -> None:
        """Write both files to disk."""
        with full_disk_errors(self.path):
            for file in (self._file, self._timing_file):
                if file is not None and not file.closed:
                    file.flush()
                    os.fsync(file.fileno())

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        for file in (self._file, self._timing_file):
            if file is not None:
                file.close()


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the records of a JSONL file; an incomplete last line is left out."""
    records = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                records.append(json.loads(line))
    return records


def _line(step: int, values: Values) -> str:
    finite = {name: _finite(value) for name, value in plain(values).items()}
    return json.dumps({"step": step, **finite}, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return value if math.isfinite(value) else None


def _repair(path: pathlib.Path, resume_step: int | None) -> None:
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    if resume_step is not None:
        steps = [_step_of(line) for line in lines]
        if unreadable := steps.count(None):
            logger.warning("%s: removing %d lines that are not records", path, unreadable)
        if resume_step == 0 and unreadable < len(lines):
            logger.warning(
                "%s: removing %d records, as the run starts again at step 0: no checkpoint of it was found",
                path, len(lines) - unreadable,
            )  # fmt: skip
        pairs = zip(lines, steps, strict=True)
        lines = [line for line, step in pairs if step is not None and step <= resume_step]
    if "".join(lines) != text:
        write_atomic(path, "".join(lines))


def _step_of(line: str) -> int | None:
    """Return the step of a record, or None for a line that is not a record."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None


class TensorBoardWriter:
    """A writer of scalars as TensorBoard events, through tensorboardX.

    Each entry of a metric that is an array is a separate scalar, ``load/0``, ``load/1``, ...: a curve per expert instead of a
    histogram without their identities. TensorBoard shows them in one section.

    Args:
        folder: The folder for the event files.
        resume_step: The step from which the run continues; TensorBoard hides later events of earlier files.

    Raises:
        DiskFullError: The disk is full; by all methods.
    """

    def __init__(self, folder: str | os.PathLike[str], *, resume_step: int | None = None):
        require("TensorBoard events", "tensorboardX")
        # Slow to import. Not `SummaryWriter`: its thread dies on a full disk, and then its queue blocks forever.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import (
            Event,  # pyrefly: ignore[missing-module-attribute] made at run time by protobuf
            SessionLog,  # pyrefly: ignore[missing-module-attribute] made at run time by protobuf
        )
        from tensorboardX.summary import scalar

        self._event, self._scalar, self._folder = Event, scalar, folder
        self._next_flush = 0.0
        with full_disk_errors(folder):
            self._writer = EventsWriter(str(output_folder(local_path(folder)) / "events"))
            if resume_step is not None:
                start = SessionLog(status=SessionLog.START)
                self._writer.write_event(
                    Event(wall_time=time.time(), step=resume_step + 1, session_log=start)
                )

    def write(self, step: int, values: Values, timing: Values | None = None) -> None:
        """Add each value as a scalar."""
        with full_disk_errors(self._folder):
            for metric, value in plain({**values, **(timing or {})}).items():
                for name, entry in _entries(metric, value):
                    summary = self._scalar(name, entry)
                    self._writer.write_event(
                        self._event(wall_time=time.time(), step=step, summary=summary)
                    )
            if time.monotonic() >= self._next_flush:  # not each time: it waits for the disk
                self._writer.flush()
                self._next_flush = time.monotonic() + 30

    def flush(self) -> None:
        """Write the events to disk."""
        with full_disk_errors(self._folder):
            self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        with full_disk_errors(self._folder):
            self._writer.close()


def _entries(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, list):
        yield name, value
        return
    for index, entry in enumerate(value):
        yield from _entries(f"{name}/{index}", entry)


class MultiWriter:
    """Several writers as one."""

    def __init__(self, writers: Sequence[MetricsWriter]):
        self.writers = tuple(writers)

    def write(self, step: int, values: Values, timing: Values | None = None) -> None:
        """Pass the metrics to each writer."""
        for writer in self.writers:
            writer.write(step, values, timing)

    def flush(self) -> None:
        """Flush each writer."""
        for writer in self.writers:
            writer.flush()

    def close(self) -> None:
        """Close each writer, even if one of them fails."""
        errors = []
        for writer in self.writers:
            try:
                writer.close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]


def step_seconds(folder: pathlib.Path, num_steps: int, stages: Stages[Any] | None = None) -> float:
    """Return the seconds of a run's first training steps, without compilations and evaluations.

    It is the sum over the stages of the median time of a step, which a few slow steps do not change. A stage that
    was never timed takes the median of all steps. If no step was timed, the result is NaN.

    Args:
        folder: The folder with ``metrics.jsonl`` and ``timing.jsonl``.
        num_steps: Number of steps.
        stages: The stages of the run; None is a single one.
    """
    stages = Stages((0,), (None,)) if stages is None else stages
    records = read_jsonl(folder / "metrics.jsonl")
    tokens = {record["step"]: record["tokens"] for record in records if "tokens" in record}
    timing = folder / "timing.jsonl"
    times: dict[int, list[float]] = {}
    for record in read_jsonl(timing) if timing.is_file() else []:
        step = record["step"]
        if step in tokens and step - 1 in tokens:
            seconds = (tokens[step] - tokens[step - 1]) / record["tokens_per_second"]
            times.setdefault(stages.index(step - 1), []).append(seconds)
    if not times:
        return math.nan
    median = statistics.median(itertools.chain(*times.values()))
    ends = [*stages.starts[1:], num_steps]
    return sum(
        max(0, min(end, num_steps) - start) * statistics.median(times.get(stage, [median]))
        for stage, (start, end) in enumerate(zip(stages.starts, ends, strict=True))
    )
