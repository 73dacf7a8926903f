"""The reduce of an analysis: DuckDB sorts the values of all shards out of core."""

import contextlib
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

import numpy as np

from effscale.curriculum.analysis.map import SAMPLE
from effscale.curriculum.index import PERCENTILES

ROW_GROUP = 1 << 20


def sort_metric(
    shards: Sequence[pathlib.Path],
    metric: str,
    target: pathlib.Path,
    *,
    num_samples: int,
    spill: pathlib.Path,
    num_threads: int,
    memory_limit: str,
) -> dict[str, Any]:
    """Write the values of a metric with their samples, sorted, as a Parquet file and as two arrays.

    DuckDB sorts and PyArrow writes, so that the file is byte for byte the same for any number of threads.

    Args:
        shards: Parquet files with a column ``sample`` and one named like the metric.
        metric: The metric.
        target: The Parquet file to write. The arrays are written to the same folder.
        num_samples: The total number of samples in the shards.
        spill: A folder for what does not fit into memory.
        num_threads: The number of threads of the sort.
        memory_limit: The memory limit of the sort, in DuckDB's notation: ``"1GB"``.

    Returns:
        The metric's entry of ``index.json``.

    Raises:
        ValueError: Some shards contain integers and others floating-point numbers.
    """
    import duckdb
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {str(pq.read_schema(path).field(metric).type) for path in shards}
    if len(types) > 1:
        raise ValueError(
            f"metric {metric!r} must return either integers or floating-point numbers, "
            "got both for different samples"
        )
    # The smallest position with at least p% of the samples up to it, in integer arithmetic.
    places = [max(-(-num_samples * percent // 100), 1) - 1 for percent in PERCENTILES]
    percentiles: list[int | float] = []
    schema = pa.schema({"value": pa.type_for_alias(types.pop()), SAMPLE: pa.int64()})
    config: dict[str, bool | float | int | list[str] | str] = {
        "threads": num_threads,
        "memory_limit": memory_limit,
        "temp_directory": str(spill),
    }
    offset = 0
    with (
        duckdb.connect(config=config) as engine,
        pq.ParquetWriter(
            target,
            schema,
            compression="zstd",
            use_dictionary=["value"],
            column_encoding={SAMPLE: "DELTA_BINARY_PACKED"},
            write_page_checksum=True,
        ) as writer,
        contextlib.ExitStack() as stack,
    ):
        arrays = {
            name: stack.enter_context(_array(target, name, schema.field(name).type, num_samples))
            for name in schema.names
        }
        rows = engine.read_parquet([str(path) for path in shards])
        rows = rows.project(f'"{metric}" AS value, {SAMPLE}').order(f"value, {SAMPLE}")
        for table in _row_groups(rows.to_arrow_reader(ROW_GROUP)):
            table = table.cast(schema)
            writer.write_table(table, row_group_size=ROW_GROUP)
            for name, stream in arrays.items():
                stream.write(np.ascontiguousarray(table[name].to_numpy()).data)
            while len(percentiles) < len(places) and places[len(percentiles)] < offset + len(table):
                percentiles.append(table["value"][places[len(percentiles)] - offset].as_py())
            offset += len(table)
    if offset != num_samples:
        raise RuntimeError(
            f"the shards of {metric!r} have {offset} samples instead of {num_samples}"
        )
    return {
        "file": target.name,
        **{f"{name}s": pathlib.Path(stream.name).name for name, stream in arrays.items()},
        "dtype": str(schema.field("value").type.to_pandas_dtype().__name__),
        "min": percentiles[0],
        "max": percentiles[-1],
        "percentiles": percentiles,
    }


def _array(target: pathlib.Path, name: str, kind: Any, length: int) -> IO[bytes]:
    """Open a new ``.npy`` file of a column and write its header; the numbers follow."""
    # Not `open_memmap`, as writing to it kills the process when the disk is full.
    stream = open(target.with_name(f"{target.stem}.{name}s.npy"), "wb")  # noqa: SIM115
    dtype = np.dtype(kind.to_pandas_dtype())
    header = {"descr": dtype.str, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream


def _row_groups(batches: Iterable[Any]) -> Iterator[Any]:
    """Split a stream of Arrow batches of any size into equal tables."""
    import pyarrow as pa

    waiting: list[Any] = []
    for batch in batches:
        waiting.append(batch)
        if sum(map(len, waiting)) >= ROW_GROUP:
            table = pa.Table.from_batches(waiting)
            yield table.slice(0, ROW_GROUP)
            waiting = table.slice(ROW_GROUP).to_batches()
    if waiting:
        yield pa.Table.from_batches(waiting)
