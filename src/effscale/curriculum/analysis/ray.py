"""An analysis on a cluster, by Ray Data."""

import functools
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from effscale.curriculum.analysis.map import Columns, MapFunction, Shard
from effscale.curriculum.analysis.workers import MAX_TRIES

PREFIX = "column:"  # a metric may have the name of an argument of NumPy's


def ray_runner(function: MapFunction, shards: Sequence[Shard]) -> Iterator[tuple[Shard, Columns]]:
    """Maps shards with Ray Data: ``analyze(..., run=ray_runner)``.

    It uses the cluster that Ray is connected to, or else starts Ray on this machine. The source must
    be readable on every node, as a token store on a shared disk is; values come back through Ray, so
    the index's folder is needed on this machine only. The shard of a lost worker is run again, a
    few times.

    Raises:
        ModuleNotFoundError: The extra ``ray`` is not installed.
    """
    try:
        import ray.data
    except ModuleNotFoundError as error:
        error.add_note(
            "Analysis with Ray needs Ray Data: install it with pip install 'ray[data]' duckdb pyarrow"
        )
        raise
    if not shards:
        return
    items = [shard._asdict() for shard in shards]
    results = ray.data.from_items(items, override_num_blocks=len(items)).map(
        functools.partial(_map_one, function), max_retries=MAX_TRIES - 1
    )
    for row in results.iter_rows():
        with np.load(io.BytesIO(row["columns"]), allow_pickle=False) as columns:
            shard = Shard(row["index"], row["start"], row["stop"])
            yield shard, {name.removeprefix(PREFIX): columns[name] for name in columns}


def _map_one(function: MapFunction, row: dict[str, Any]) -> dict[str, Any]:
    # As bytes: Ray would make its own types of arrays, and may cut large blocks.
    stream = io.BytesIO()
    columns = function(Shard(**row))
    np.savez(stream, allow_pickle=False, **{PREFIX + name: columns[name] for name in columns})
    return {**row, "columns": stream.getvalue()}
