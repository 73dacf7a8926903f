"""The map of an analysis: the computation for one shard, in any process."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from effscale.curriculum.analysis.rows import read_rows
from effscale.curriculum.metrics import Batch, Metric

SAMPLE = "sample"
TOTAL = "total"
Columns = dict[str, np.ndarray]


class Shard(NamedTuple):
    """A contiguous range of samples."""

    index: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"shard {self.index} (samples {self.start} to {self.stop - 1})"


MapFunction = Callable[[Shard], Columns]
Runner = Callable[[MapFunction, Sequence[Shard]], Iterator[tuple[Shard, Columns]]]
"""Applies a function to shards, anywhere and in any order, and yields each with its columns."""


def plan_shards(num_samples: int, shard_size: int | None = None) -> list[Shard]:
    """Divide samples into shards; by default about 256, of at least 1024 samples each.

    >>> [str(shard) for shard in plan_shards(10, 6)]
    ['shard 0 (samples 0 to 5)', 'shard 1 (samples 6 to 9)']
    """
    if shard_size is None:
        shard_size = max(-(-num_samples // 256), 1024)
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, got {shard_size}")
    starts = range(0, num_samples, shard_size)
    return [
        Shard(index, start, min(start + shard_size, num_samples))
        for index, start in enumerate(starts)
    ]


def map_metrics(
    source: Any, metrics: Mapping[str, Metric], batch_size: int, shard: Shard
) -> Columns:
    """Compute the values of each metric for the samples of a shard.

    Raises:
        ValueError: A metric does not return one finite number per row.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in metrics}
    for start, batch in _batches(source, batch_size, shard):
        size = min(start + batch_size, shard.stop) - start
        for name, metric in metrics.items():
            values = _called(metric, f"metric {name!r}", batch, start, size)
            parts[name].append(_checked(name, values, start, size))
    columns = {SAMPLE: np.arange(shard.start, shard.stop, dtype=np.int64)}
    for name, values in parts.items():
        if len({part.dtype for part in values}) > 1:
            raise ValueError(
                f"metric {name!r} must return either integers or floating-point numbers, got both for "
                f"batches of {shard}"
            )
        columns[name] = np.concatenate(values)
    return columns


def map_total(
    source: Any, function: Callable[[Batch], Any], batch_size: int, shard: Shard
) -> Columns:
    """Sum the results of a function over the batches of a shard.

    Raises:
        ValueError: The arrays have different shapes or are not finite.
    """
    total = None
    for start, batch in _batches(source, batch_size, shard):
        size = min(start + batch_size, shard.stop) - start
        part = _as_numbers(_called(function, "the function", batch, start, size), "the function")
        if not np.isfinite(part).all():
            raise ValueError(
                f"the function must return finite numbers, got others for samples {start} to {start + size - 1}"
            )
        total = part if total is None else added(total, part)
    assert total is not None  # a shard has at least one sample
    return {TOTAL: total}


def added(total: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Return the sum, or raise an error if the shape depends on the batch size."""
    if total.shape != part.shape:
        raise ValueError(
            f"the shape of the function's result must not depend on the number of rows, got {total.shape} for some "
            f"batches and {part.shape} for others"
        )
    return total + part


def _batches(source: Any, batch_size: int, shard: Shard) -> Iterator[tuple[int, Batch]]:
    for start in range(shard.start, shard.stop, batch_size):
        yield start, read_rows(source, start, min(start + batch_size, shard.stop))


def _called(
    function: Callable[[Batch], Any], what: str, batch: Batch, start: int, size: int
) -> Any:
    try:
        return function(batch)
    except Exception as error:
        error.add_note(f"In {what} on samples {start} to {start + size - 1}.")
        raise


def _as_numbers(values: Any, what: str) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(
            f"{what} must have integers or floating-point numbers of NumPy's types, "
            f"got type {array.dtype}, such as {array.ravel()[:1].tolist()}"
        )
    if array.dtype.kind == "f":
        return array.astype(np.float64)
    if array.dtype.kind == "u" and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{what} must have integers below 2**63, got {array.max()}")
    return array.astype(np.int64)


def _checked(name: str, values: Any, start: int, size: int) -> np.ndarray:
    what = f"metric {name!r} of samples {start} to {start + size - 1}"
    array = np.asarray(values)
    if array.shape != (size,):
        raise ValueError(
            f"{what} must have shape ({size},), one value per sample, got {array.shape}"
        )
    array = _as_numbers(array, what)
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise ValueError(
            f"metric {name!r} of sample {start + bad[0]} must be a finite number, got {array[bad[0]]}"
        )
    return array
