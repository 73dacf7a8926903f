"""Analysis of a corpus before training: the difficulty of each sample.

A map computes the values of each metric shard by shard, in processes or on a cluster, and a reduce
sorts them into a `DifficultyIndex`. Neither keeps the corpus or the values in memory. The result does
not depend on the number of workers or shards, or on the batch size.
"""

import functools
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, Shaped

from effscale.atomic import atomic_folder
from effscale.curriculum.analysis.map import (
    SAMPLE,
    TOTAL,
    Columns,
    MapFunction,
    Runner,
    Shard,
    added,
    map_metrics,
    map_total,
    plan_shards,
)
from effscale.curriculum.analysis.reduce import sort_metric
from effscale.curriculum.analysis.shards import claimed, full_disk_errors, remove_leftovers
from effscale.curriculum.analysis.workers import local_runner
from effscale.curriculum.digests import fingerprint, metric_digest
from effscale.curriculum.index import INDEX, DifficultyIndex, shards_folder, write_manifest
from effscale.curriculum.metrics import Batch, Metric, TokenCounts
from effscale.data import TokenStore
from effscale.data.statistics import token_counts
from effscale.paths import local_path


class AnalysisProgress(NamedTuple):
    """The progress of an analysis."""

    samples: int
    num_samples: int


def analyze(
    source: Any,
    metrics: Mapping[str, Metric],
    folder: str | os.PathLike[str],
    *,
    num_workers: int = 0,
    batch_size: int = 256,
    shard_size: int | None = None,
    memory_limit: str = "1GB",
    overwrite: bool = False,
    progress: Callable[[AnalysisProgress], object] | None = None,
    run: Runner | None = None,
) -> DifficultyIndex:
    """Rank the samples of a corpus by difficulty.

    Finished shards are kept next to the index, in a folder named ``.<folder>.analysis``, until the index
    is complete. After a crash, the same call resumes from there. If an index of the same source and
    metrics already exists, it is opened. Metrics without a digest (see `metric_digest`), such as lambdas
    and closures, are always computed again, as they may have changed.

    Only one process can analyze into a folder at a time. If the file system has locks, a second one
    raises an error.

    Args:
        source: A source with ``len()`` that returns rows, dicts of arrays, by position: a `PackedTokens`, a
            `grain.MapDataset`, a list. The position is the id of the sample. See `read_rows` for rows of
            different lengths, and for sources that return whole ranges of rows.
        metrics: The metrics by name; see `effscale.curriculum.metrics`. The files are named after them.
        folder: The folder of the index.
        num_workers: The number of processes; 0 computes in this process, which metrics on an accelerator
            need. Each process uses the memory of a batch and of the values of a shard.
        batch_size: The number of rows passed to a metric in one call.
        shard_size: The number of samples in a shard; by default about 256 shards, of at least 1024 samples each.
        memory_limit: The memory limit of the sort, in DuckDB's notation. The rest is spilled to disk.
        overwrite: Whether to replace an index of another source or other metrics.
        progress: Called when shards are finished.
        run: How to map shards instead of in local processes, such as
            ``effscale.curriculum.analysis.workers.ray_runner``.

    Raises:
        ValueError: The source is empty, an argument is out of range, or a metric does not return
            one finite number per row.
        FileExistsError: A different index, or one with a metric without a digest, exists and
            ``overwrite`` is false; or the place of the finished shards is taken by something else.
        RuntimeError: The process of a shard was killed repeatedly, or another process analyzes into
            this folder.
        DiskFullError: The disk is full. Finished shards are kept.

    Example:
        >>> import tempfile
        >>> from effscale.curriculum.metrics import sequence_length
        >>> texts = [[5, 6, 7], [5], [6, 7]]
        >>> source = [{"input_ids": np.array(ids)} for ids in texts]
        >>> folder = tempfile.mkdtemp() + "/index"
        >>> index = analyze(source, {"length": sequence_length}, folder)
        >>> index.ranking("length", source=source).samples
        array([1, 2, 0])

    References:
        Li et al., "DeepSpeed Data Efficiency" (2022), section 3.1. https://arxiv.org/abs/2212.03597
    """
    target = local_path(folder).absolute()
    _check_names(metrics)
    shards = _plan(source, batch_size, shard_size)
    identity = {
        "source": fingerprint(source),
        "metrics": {name: metric_digest(metric) for name, metric in metrics.items()},
    }
    if target.exists() and not overwrite:
        index = _existing(target, identity)
        remove_leftovers(shards_folder(target), identity)
        return index
    with claimed(shards_folder(target), identity) as finished:
        if target.exists() and not overwrite:
            return _existing(target, identity)  # another process has just finished it
        waiting = [shard for shard in shards if not finished.is_finished(shard)]
        function = functools.partial(map_metrics, source, dict(metrics), batch_size)
        for shard, columns in _mapped(
            function, waiting, len(source), run or local_runner(num_workers), progress
        ):
            finished.write(shard, columns)
        with full_disk_errors(target), atomic_folder(target, overwrite=overwrite) as temporary:
            entries = {}
            for name in metrics:
                entry = sort_metric(
                    [finished.path(shard) for shard in shards],
                    name,
                    temporary / f"{name}.parquet",
                    num_samples=len(source),
                    spill=finished.folder / "spill",
                    num_threads=max(num_workers, 1),
                    memory_limit=memory_limit,
                )
                entries[name] = {**entry, "digest": identity["metrics"][name]}
            content = {"num_samples": len(source), "source": identity["source"], "metrics": entries}
            write_manifest(temporary, content)
        finished.remove()
    return DifficultyIndex.open(target)


def accumulate(
    source: Any,
    function: Callable[[Batch], Any],
    *,
    num_workers: int = 0,
    batch_size: int = 256,
    shard_size: int | None = None,
    progress: Callable[[AnalysisProgress], object] | None = None,
    run: Runner | None = None,
) -> Shaped[np.ndarray, "..."]:
    """Sum the results of a function over the batches of a corpus.

    Sums of integers are exact. Sums of floating-point numbers are taken in the order of the samples, so
    their last bits depend on the batch and shard sizes, and on nothing else.

    Args:
        source: As for `analyze`.
        function: A function from a batch to an array of numbers whose shape does not depend on the batch.
        num_workers: As for `analyze`.
        batch_size: As for `analyze`.
        shard_size: As for `analyze`.
        progress: As for `analyze`.
        run: As for `analyze`.

    Raises:
        ValueError: The source is empty, or the arrays have different shapes or are not numeric.
    """
    shards = _plan(source, batch_size, shard_size)
    mapped = functools.partial(map_total, source, function, batch_size)
    # Results that arrive early wait for their turn.
    early: dict[int, np.ndarray] = {}
    total, turn = None, 0
    for shard, columns in _mapped(
        mapped, shards, len(source), run or local_runner(num_workers), progress
    ):
        early[shard.index] = columns[TOTAL]
        while turn in early:
            part = early.pop(turn)
            total = part if total is None else added(total, part)
            turn += 1
    assert total is not None  # there is at least one shard
    return total


def count_vocabulary(
    source: Any,
    vocab_size: int,
    *,
    field: str = "input_ids",
    num_workers: int = 0,
    batch_size: int = 256,
    shard_size: int | None = None,
    progress: Callable[[AnalysisProgress], object] | None = None,
    run: Runner | None = None,
) -> Int64[np.ndarray, " vocab"]:
    """Count how often each token occurs in a corpus.

    Args:
        source: Rows as for `analyze`, or a `TokenStore`, which is always counted in this process, regardless of
            the keyword arguments. Rows for next-token prediction count their ``length + 1`` tokens. So the first
            token of each row of a `PackedTokens` except one is counted twice, just as `VocabularyRarity` sees it twice.
        vocab_size: The size of the vocabulary; every id is smaller.
        field: The name of the tokens in a row.
        num_workers: As for `analyze`.
        batch_size: As for `analyze`.
        shard_size: As for `analyze`.
        progress: As for `analyze`.
        run: As for `analyze`.

    Raises:
        ValueError: The source is empty or contains an id outside the vocabulary.
    """
    if not isinstance(source, TokenStore):
        return accumulate(
            source,
            TokenCounts(vocab_size, field=field),
            num_workers=num_workers,
            batch_size=batch_size,
            shard_size=shard_size,
            progress=progress,
            run=run,
        )
    counts = token_counts(source)
    if counts[vocab_size:].any():
        raise ValueError(
            f"vocab_size must be above the greatest token {np.flatnonzero(counts)[-1]} of {source!r}, got {vocab_size}"
        )
    counts = counts[:vocab_size]
    return np.pad(counts, (0, vocab_size - len(counts)))


def _mapped(
    function: MapFunction,
    shards: list[Shard],
    num_samples: int,
    run: Runner,
    progress: Callable[[AnalysisProgress], object] | None,
) -> Iterator[tuple[Shard, Columns]]:
    done = num_samples - sum(shard.stop - shard.start for shard in shards)
    for shard, columns in run(function, shards):
        yield shard, columns
        done += shard.stop - shard.start
        if progress is not None:
            progress(AnalysisProgress(done, num_samples))


def _plan(source: Any, batch_size: int, shard_size: int | None) -> list[Shard]:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if isinstance(source, TokenStore):
        raise ValueError(f"{source!r} has no rows. Use PackedTokens(store, length).")
    if len(source) == 0:
        raise ValueError("the source has no samples")
    if len(source) == sys.maxsize:
        raise ValueError("the source is endless. Analyze one epoch, before it is repeated.")
    return plan_shards(len(source), shard_size)


def _check_names(metrics: Mapping[str, Metric]) -> None:
    if not metrics:
        raise ValueError("metrics must have at least one metric, got {}")
    seen = {SAMPLE}
    for name in metrics:
        if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
            raise ValueError(
                f"the name of a metric must be a file name of letters, digits, '_', '.' and '-', got {name!r}"
            )
        # DuckDB columns and some file systems are case-insensitive.
        if name.lower() in seen:
            raise ValueError(
                f"the names of metrics must differ by more than case, got {name!r} twice"
            )
        seen.add(name.lower())


def _existing(target: pathlib.Path, identity: dict[str, Any]) -> DifficultyIndex:
    if (target / INDEX).exists():
        index = DifficultyIndex.open(target)
        digests = {name: entry["digest"] for name, entry in index.manifest["metrics"].items()}
        if digests == identity["metrics"] and index.fingerprint == identity["source"]:
            unknown = [name for name, digest in digests.items() if digest is None]
            if not unknown:
                return index
            raise FileExistsError(
                f"{target}: an index of this source exists, but it is unknown whether it is of these metrics, "
                f"as {', '.join(map(repr, unknown))} has no digest (lambdas and closures have none). "
                "Open it with DifficultyIndex.open, pass overwrite=True to compute it again, use a "
                "function of a module, or set an attribute digest, a string."
            )
    raise FileExistsError(
        f"{target}: exists and is not the index of this source and these metrics. Choose another "
        "folder, or pass overwrite=True to replace it."
    )
