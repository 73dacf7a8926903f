"""Analysis of a corpus before training: how difficult is each sample?

A map computes the values of each metric shard by shard, in processes or on a cluster, and a reduce
sorts them into a `DifficultyIndex`. Neither holds the corpus, or the values, in memory. The result does
not depend on the number of workers, of shards, or of rows in a batch.
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
from effscale.data import TokenStore, token_counts


class AnalysisProgress(NamedTuple):
    """How far an analysis has come."""

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

    Finished shards are kept in a folder beside the index, named ``.<folder>.analysis``, until the index
    is complete. After a crash the same call goes on from there. If the index is there already, of the
    same source and metrics, it is opened. Neither holds for metrics that have no digest (see
    `metric_digest`), such as lambdas and closures: they are computed again, as they may have changed.

    One process analyzes into a folder at a time. Another is refused, if the file system has locks.

    Args:
        source: Has ``len()`` and gives rows, dicts of arrays, by position: a `PackedTokens`, a
            `grain.MapDataset`, a list. The position is the sample's id. See `read_rows` for rows of
            unequal length, and for sources that give whole ranges of rows at once.
        metrics: By name; see `effscale.curriculum.metrics`. The names are those of the files.
        folder: Where the index goes.
        num_workers: Processes; 0 computes in this one, as a metric on an accelerator must. The memory
            of each is that of a batch and of the values of a shard.
        batch_size: Rows given to a metric at once.
        shard_size: Samples in a shard; by default there are about 256 shards of at least 1024.
        memory_limit: What the sort may use, as DuckDB writes it. What does not fit goes to the disk.
        overwrite: Replace an index of another source or other metrics.
        progress: Called when shards are finished.
        run: Where shards are mapped instead of in local processes, such as
            `effscale.curriculum.analysis.ray.ray_runner`.

    Raises:
        ValueError: The source is empty, an argument is out of range, or a metric gives something
            else than one finite number a row.
        FileExistsError: There is another index, or one of a metric without a digest, and
            ``overwrite`` is false; or there is something else where finished shards go.
        RuntimeError: A shard's process was killed again and again, or another process analyzes into
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

    Source: arXiv 2212.03597, section 3.1.
    """
    target = pathlib.Path(folder).absolute()
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
    """Return the sum over a corpus of what a function gives for each batch.

    Sums of integers are exact. Those of floating numbers are taken in the order of the samples, so
    they depend on the sizes of batches and shards in their last bits, and on nothing else.

    Args:
        source: As for `analyze`.
        function: From a batch to an array of numbers, whose shape does not depend on the batch.
        num_workers: As for `analyze`.
        batch_size: As for `analyze`.
        shard_size: As for `analyze`.
        progress: As for `analyze`.
        run: As for `analyze`.

    Raises:
        ValueError: The source is empty, or the arrays are of different shapes or not of numbers.
    """
    shards = _plan(source, batch_size, shard_size)
    mapped = functools.partial(map_total, source, function, batch_size)
    # Whatever comes early waits for its turn.
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
    """How often each token occurs in a corpus.

    Args:
        source: Rows as for `analyze`, or a `TokenStore`, which is counted in this process, whatever the keyword
            arguments. Rows for next-token prediction count their ``length + 1`` tokens, so that the first token of
            all but one row of a `PackedTokens` is counted twice, as `VocabularyRarity` sees it twice.
        vocab_size: Every id is below it.
        field: The name of the tokens in a row.
        num_workers: As for `analyze`.
        batch_size: As for `analyze`.
        shard_size: As for `analyze`.
        progress: As for `analyze`.
        run: As for `analyze`.

    Raises:
        ValueError: The source is empty or has an id that is not below ``vocab_size``.
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
            f"vocab_size={vocab_size}: {source!r} has token {np.flatnonzero(counts)[-1]}."
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
        raise ValueError(f"{source!r} has no rows: give PackedTokens(store, length).")
    if len(source) == 0:
        raise ValueError("the source has no samples.")
    if len(source) == sys.maxsize:
        raise ValueError("the source has no end: analyze one epoch, before it is repeated.")
    return plan_shards(len(source), shard_size)


def _check_names(metrics: Mapping[str, Metric]) -> None:
    if not metrics:
        raise ValueError("metrics={}: give at least one metric.")
    seen = {SAMPLE}
    for name in metrics:
        if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
            raise ValueError(
                f"metric {name!r}: a name is that of a file, of letters, digits and any of _ . -"
            )
        # Neither columns of DuckDB nor files everywhere tell upper from lower case.
        if name.lower() in seen:
            raise ValueError(f"metric {name!r}: the name is taken, whatever its case.")
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
                f"{str(target)!r} exists, of this source, and whether it is of these metrics cannot be "
                f"told: {', '.join(map(repr, unknown))} has no digest, as lambdas and closures have none. "
                "Open it with DifficultyIndex.open, pass overwrite=True to compute it again, or use a "
                "function of a module or give it an attribute digest, a string."
            )
    raise FileExistsError(
        f"{str(target)!r} exists and is not the index of this source and these metrics. Choose another "
        "folder, or pass overwrite=True to replace it."
    )
