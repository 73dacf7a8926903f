"""Parquet files as a corpus."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from effscale.data.documents import Document, SkipReport, Source
from effscale.data.sources import fields, files
from effscale.extras import require
from effscale.options import PositiveInt


@dataclass(frozen=True, kw_only=True)
class Parquet(Source):
    """Parquet files with a column of text; needs pyarrow (the extra ``data``).

    Rows are read in batches, so memory use depends only on the batch size and the page size of the files.

    Attributes:
        paths: Files and globs.
        field: The column that contains the text.
        batch_rows: The number of rows to read at a time.
    """

    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
    field: str = "text"
    batch_rows: PositiveInt = 256

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "paths", files.as_paths(self.paths))
        fields.check(self.field)

    def _read(self, skipped: SkipReport) -> Iterator[Document]:
        require("reading Parquet files", "pyarrow")
        import pyarrow as pa
        import pyarrow.parquet as pq

        for path in files.expand(files.as_paths(self.paths)):
            row = 0
            try:
                with pq.ParquetFile(
                    path, pre_buffer=False, page_checksum_verification=True
                ) as file:
                    names = file.schema_arrow.names
                    if self.field not in names:
                        detail = fields.missing(self.field, names)
                        self._fault(skipped, "missing_field", str(path), detail)
                        continue
                    for batch in file.iter_batches(self.batch_rows, columns=[self.field]):
                        for text in batch.column(0).to_pylist():
                            row += 1
                            yield from self._accept(skipped, text, f"{path}:row {row}")
            except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
                where = f"{path}:row {row + 1}" if row else str(path)
                self._fault(skipped, "unreadable", where, f"cannot be read ({error})")
                continue
            if not row:
                self._fault(skipped, "empty", str(path), "the file has no rows")

    def spec(self) -> str:
        """Return the string form of the source, as `parse_source` reads it."""
        return f"parquet:{','.join(files.as_paths(self.paths))}#{self.field}"

    def fingerprint(self) -> dict[str, Any]:
        """Return the names, sizes and times of the files, and the column."""
        return {
            "source": self.spec(),
            "files": files.fingerprint(files.as_paths(self.paths)),
            "on_error": self.on_error,
        }
