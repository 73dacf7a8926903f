"""JSON Lines files as a corpus."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from effscale.data.documents import Document, SkipReport, Source
from effscale.data.sources import fields, files


@dataclass(frozen=True, kw_only=True)
class JsonLines(Source):
    """JSON Lines files, plain or gzipped (``.gz``): one JSON object per line, with the document in one of its fields.

    Attributes:
        paths: Files and globs.
        field: The field that contains the text.
    """

    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
    field: str = "text"

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "paths", files.as_paths(self.paths))
        fields.check(self.field)

    def _read(self, skipped: SkipReport) -> Iterator[Document]:
        for path in files.expand(files.as_paths(self.paths)):
            lines = 0
            try:
                with files.open_binary(path) as stream:
                    for number, line in enumerate(stream, start=1):
                        if not line.isspace():
                            lines += 1
                            yield from self._parse(skipped, line, f"{path}:{number}")
            except files.READ_ERRORS as error:
                self._fault(skipped, "unreadable", str(path), f"cannot be read ({error})")
                continue
            if not lines:
                self._fault(skipped, "empty", str(path), "the file is empty")

    def _parse(self, skipped: SkipReport, line: bytes, where: str) -> Iterator[Document]:
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            detail = f"not UTF-8 (byte 0x{line[error.start]:02x})"
            self._fault(skipped, "not_utf8", where, detail)
        except (ValueError, RecursionError) as error:
            self._fault(skipped, "bad_json", where, f"not JSON ({error})")
        else:
            if not isinstance(record, dict):
                detail = f"{type(record).__name__} instead of a JSON object"
                self._fault(skipped, "bad_json", where, detail)
            elif self.field not in record:
                self._fault(skipped, "missing_field", where, fields.missing(self.field, record))
            else:
                yield from self._accept(skipped, record[self.field], where)

    def spec(self) -> str:
        """Return the string form of the source, as `parse_source` reads it."""
        return f"jsonl:{','.join(files.as_paths(self.paths))}#{self.field}"

    def fingerprint(self) -> dict[str, Any]:
        """Return the names, sizes and times of the files, and the field."""
        return {
            "source": self.spec(),
            "files": files.fingerprint(files.as_paths(self.paths)),
            "on_error": self.on_error,
        }
