"""Map the shards of an analysis on one machine, in this process, in others, or on a Ray cluster."""

import collections
import concurrent.futures
import functools
import io
import multiprocessing
import os
import pickle
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from effscale.curriculum.analysis.map import Columns, MapFunction, Runner, Shard
from effscale.extras import require

MAX_TRIES = 3


def local_runner(num_workers: int) -> Runner:
    """Return a runner that maps shards in ``num_workers`` processes, or in this one if 0."""
    if num_workers < 0:
        raise ValueError(f"num_workers must be at least 0, got {num_workers}")
    if num_workers == 0:
        return lambda function, shards: ((shard, function(shard)) for shard in shards)
    return lambda function, shards: _in_processes(function, shards, num_workers)


def _in_processes(
    function: MapFunction, shards: Sequence[Shard], num_workers: int
) -> Iterator[tuple[Shard, Columns]]:
    """Map shards in processes; if a process is killed, its shard is mapped again.

    When a process dies its pool breaks, and any of the shards in progress may be the reason. Those
    are tried again after all others and one at a time. So a shard that always kills its
    process is identified and does not affect the others.
    """
    content = _pickled(function)
    waiting = collections.deque(shards)
    deaths: collections.Counter[Shard] = collections.Counter()
    while waiting:
        running: dict[concurrent.futures.Future[Columns], Shard] = {}
        pool = concurrent.futures.ProcessPoolExecutor(
            min(num_workers, len(waiting)),
            # A fork would copy JAX's thread locks.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(content,),
        )
        try:
            while waiting or running:
                while waiting and len(running) < num_workers:
                    together = [*running.values(), waiting[0]]
                    if running and any(deaths[shard] for shard in together):
                        break
                    running[pool.submit(_call, waiting[0])] = waiting[0]
                    waiting.popleft()
                done, _ = concurrent.futures.wait(
                    running, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    columns = future.result()
                    yield running.pop(future), columns
        except BrokenProcessPool:
            waiting.extend(running.values())
            for shard in running.values():
                deaths[shard] += 1
                if deaths[shard] == MAX_TRIES:
                    raise RuntimeError(
                        f"{shard} failed: its process was killed {MAX_TRIES} times. If memory ran "
                        "out, use fewer workers or a smaller batch_size. A script that starts processes "
                        "must do so under `if __name__ == '__main__':`. With num_workers=0 the error "
                        "occurs in this process. Finished shards are kept."
                    ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _pickled(function: MapFunction) -> bytes:
    try:
        return pickle.dumps(function)
    except Exception as error:
        error.add_note(
            "The source and the metrics must be picklable to be used in other processes. Make them "
            "functions or classes of a module, or use num_workers=0."
        )
        raise


_content: bytes
_function: MapFunction | None = None


def _begin(content: bytes) -> None:
    """Initialize a worker: load the function, and watch the parent process."""
    global _content
    _content = content

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)  # the parent was killed, so the result is not needed

    threading.Thread(target=watch, daemon=True).start()


def _call(shard: Shard) -> Columns:
    # Load it with the first shard: an error here is reported, one in the initializer is not.
    global _function
    if _function is None:
        _function = pickle.loads(_content)
    return _function(shard)


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
