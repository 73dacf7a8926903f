"""The files of finished shards, which a later run of the same analysis takes up."""

import json
import os
import pathlib
from typing import Any

from effscale.curriculum.analysis_map import Columns, Shard
from effscale.data.atomic import flush

KEY = b"effscale"


class ShardFolder:
    """Finished shards of one analysis as Parquet files, ``00000.parquet`` and so on.

    A file has a column ``sample`` and one for each metric. It appears whole, has checksums, and
    says of which source and metrics it is.

    Args:
        folder: Where the files are; it is made.
        identity: What the shards must be of, in plain values.
    """

    def __init__(self, folder: pathlib.Path, identity: dict[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.identity = folder, identity

    def path(self, shard: Shard) -> pathlib.Path:
        """The file of a shard."""
        return self.folder / f"{shard.index:05d}.parquet"

    def write(self, shard: Shard, columns: Columns) -> None:
        """Writes a finished shard."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table(dict(columns)).replace_schema_metadata({KEY: self._label(shard)})
        path = self.path(shard)
        temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        pq.write_table(table, temporary, write_page_checksum=True)
        flush(temporary)
        os.replace(temporary, path)

    def is_finished(self, shard: Shard) -> bool:
        """Whether the shard is there, whole, and of this analysis."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if None in self.identity["metrics"].values():
            return False  # a metric that has no digest may have changed
        try:
            with pq.ParquetFile(self.path(shard), page_checksum_verification=True) as file:
                label = (file.schema_arrow.metadata or {}).get(KEY)
                return label == self._label(shard) and len(file.read()) == shard.stop - shard.start
        except (OSError, pa.ArrowException):
            return False

    def _label(self, shard: Shard) -> bytes:
        return json.dumps({**self.identity, **shard._asdict()}, sort_keys=True).encode()
