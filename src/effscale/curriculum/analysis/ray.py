"""Run an analysis on a cluster with Ray Data."""

import functools
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from effscale.curriculum.analysis.map import Columns, MapFunction, Shard
from effscale.curriculum.analysis.workers import MAX_TRIES
from effscale.extras import require

PREFIX = "column:"  # a metric may have the name of a NumPy argument


def ray_runner(function: MapFunction, shards: Sequence[Shard]) -> Iterator[tuple[Shard, Columns]]:
    """Map shards with Ray Data: ``analyze(..., run=ray_runner)``.

    It uses the cluster that Ray is connected to, or starts Ray on this machine. The source must
    be readable on every node, for instance a token store on a shared disk. Values are returned through Ray, so
    only this machine needs the folder of the index. The shard of a lost worker is run again, a
    few times.

    Raises:
        ModuleNotFoundError: The extra ``ray`` is not installed.
    """
    require("analysis with Ray", "ray", "duckdb", "pyarrow")
    import ray.data

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
    # As bytes, because Ray converts arrays to other types and may split large blocks.
    stream = io.BytesIO()
    columns = function(Shard(**row))
    np.savez(stream, allow_pickle=False, **{PREFIX + name: columns[name] for name in columns})
    return {**row, "columns": stream.getvalue()}
