"""Plain text files as a corpus."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from effscale.data.documents import Document, SkipReport, Source
from effscale.data.sources import files
from effscale.options import Bounds

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class TextFiles(Source):
    r"""UTF-8 text files, plain or gzipped (``.gz``).

    Each file is a document, or each piece between separators. Pieces that are only white space are skipped.

    Attributes:
        paths: Files and globs (``**`` goes into subfolders).
        separator: The text between the documents of a file, such as ``"\n"``, ``"\n\n"`` or
            ``"<|endoftext|>"``. None makes each file one document.
        max_document_bytes: A longer document is split into several, cut at line ends, so that files
            larger than memory can be read. At least 4, the longest character in UTF-8.

    Raises:
        ValueError: At construction, if a field is out of range.
        FileNotFoundError: On reading, if a path or glob matches no file.
    """

    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
    separator: str | None = None
    max_document_bytes: Annotated[int, Bounds(at_least=4)] = 16 << 20

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "paths", files.as_paths(self.paths))
        if self.separator == "":
            raise ValueError("separator must be the text between documents or None, got ''")

    def _read(self, skipped: SkipReport) -> Iterator[Document]:
        separator = self.separator.encode() if self.separator else None
        for path in files.expand(files.as_paths(self.paths)):
            pieces = 0
            try:
                with files.open_binary(path) as stream:
                    for line, piece in files.split_stream(
                        stream, separator, self.max_document_bytes
                    ):
                        if line == 1:
                            piece = piece.removeprefix(_BOM)
                        if piece and not piece.isspace():
                            pieces += 1
                            where = str(path) if line == 1 and pieces == 1 else f"{path}:{line}"
                            yield from self._decode(skipped, piece, where, path, line)
            except files.READ_ERRORS as error:
                self._fault(skipped, "unreadable", str(path), f"cannot be read ({error})")
                continue
            if not pieces:
                self._fault(skipped, "empty", str(path), "the file is empty")

    def _decode(
        self, skipped: SkipReport, piece: bytes, where: str, path: os.PathLike[str], line: int
    ) -> Iterator[Document]:
        try:
            text = piece.decode()
        except UnicodeDecodeError as error:
            line += piece.count(b"\n", 0, error.start)
            detail = f"not UTF-8 (byte 0x{piece[error.start]:02x} on line {line})"
            self._fault(skipped, "not_utf8", f"{path}:{line}", detail)
        else:
            yield from self._accept(skipped, text, where)

    def spec(self) -> str:
        """Return the string form of the source, as `parse_source` reads it."""
        return "text:" + ",".join(files.as_paths(self.paths))

    def fingerprint(self) -> dict[str, Any]:
        """Return the names, sizes and times of the files, and how they are split into documents."""
        return {
            "source": self.spec(),
            "files": files.fingerprint(files.as_paths(self.paths)),
            "separator": self.separator,
            "max_document_bytes": self.max_document_bytes,
            "on_error": self.on_error,
        }
