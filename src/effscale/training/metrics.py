"""Metrics as plain numbers, and their writers: to a JSONL file, to TensorBoard, to several at once."""

import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, Protocol, runtime_checkable

import jax

from effscale.training.counter import Counter
from effscale.training.serialize import write_atomic

Values = Mapping[str, Any]
"""Metrics by name: numbers, and arrays of them (``fit`` gives nested lists)."""


def plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as Python numbers, arrays as (nested) lists of them; waits for the device."""
    return {name: _plain(jax.device_get(value)) for name, value in metrics.items()}


def _plain(value: Any) -> Any:
    """Float32 values are rounded to what float32 tells apart, to keep records short."""
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
    """What ``fit`` writes to."""

    def write(self, step: int, values: Values, timing: Values | None = None) -> None:
        """Take the metrics of a step; ``timing`` holds what a clock measured and no run repeats."""

    def flush(self) -> None:
        """Bring everything to disk; called before each checkpoint."""

    def close(self) -> None:
        """Flush and release what is held."""


class JsonlWriter:
    """One JSON object a line: ``{"step": 10, "loss": 2.3}``; a metric that is an array is a list.

    Values that a clock measured go to a second file, ``timing.jsonl`` beside it, so that two runs with the same numbers
    give the same bytes. A resumed run first cuts records beyond the restored step off, and any half-written last line.
    NaN and infinities, which JSON does not have, are written as null.

    Args:
        path: The file; missing folders are made.
        resume_step: Step from which the run goes on: later records are dropped. None keeps all.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/metrics.jsonl"
    >>> writer = JsonlWriter(path); writer.write(1, {"loss": 2.5}); writer.close()
    >>> read_jsonl(path)
    [{'step': 1, 'loss': 2.5}]
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int | None = None):
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.timing_path = self.path.with_name("timing.jsonl")
        for file in (self.path, self.timing_path):
            _repair(file, resume_step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115, closed by close()
        self._timing_file: IO[str] | None = None

    def write(self, step: int, values: Values, timing: Values | None = None) -> None:
        """Append a line, and one of timing if there is any."""
        self._file.write(_line(step, values))
        self._file.flush()  # a killed process then loses nothing that was written
        if timing:
            if self._timing_file is None:
                self._timing_file = open(self.timing_path, "a", encoding="utf-8")  # noqa: SIM115
            self._timing_file.write(_line(step, timing))

    def flush(self) -> None:
        """Bring both files to disk."""
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
    """Return the records of a JSONL file; a half-written last line is left out."""
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
        lines = [line for line in lines if _step_of(line) <= resume_step]
    if "".join(lines) != text:
        write_atomic(path, "".join(lines))


def _step_of(line: str) -> int | float:
    """Return the step of a record; a line that cannot be read belongs to no step and is dropped."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


class TensorBoardWriter:
    """Scalars as TensorBoard events, through tensorboardX.

    Each entry of a metric that is an array is a scalar of its own, ``load/0``, ``load/1``, ...: a curve per expert, and not a
    histogram that forgets which is which. TensorBoard shows them in one section.

    Args:
        folder: Where the event files go.
        resume_step: Step from which the run goes on: TensorBoard hides later events of the files before.
    """

    def __init__(self, folder: str | os.PathLike[str], *, resume_step: int | None = None):
        from tensorboardX import SummaryWriter  # slow to import

        purge = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=30)

    def write(self, step: int, values: Values, timing: Values | None = None) -> None:
        """Add each value as a scalar."""
        for metric, value in plain({**values, **(timing or {})}).items():
            for name, entry in _entries(metric, value):
                self._writer.add_scalar(name, entry, step)

    def flush(self) -> None:
        """Bring the events to disk."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
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
        """Give the metrics to each."""
        for writer in self.writers:
            writer.write(step, values, timing)

    def flush(self) -> None:
        """Flush each."""
        for writer in self.writers:
            writer.flush()

    def close(self) -> None:
        """Close each, the others too if one fails."""
        errors = []
        for writer in self.writers:
            try:
                writer.close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
