"""Read records from files or other rows, and count what was left out."""

import json
import logging
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from effscale.data.sources import files
from effscale.extras import require
from effscale.options import did_you_mean
from effscale.rlhf.data.formats import FORMATS, Converter, detect_format
from effscale.rlhf.data.record import Reason, Record, RecordError, RecordReport, fault

logger = logging.getLogger(__name__)

LEFT_OUT: frozenset[Reason] = frozenset(("empty", "identical", "tie", "diverging"))
"""Faults that occur in every large dataset; such records are always left out and counted."""

_PARQUET_ROWS = 256
# White space, and the byte order mark that some editors put at the beginning of a file.
_BLANK = b"\xef\xbb\xbf \t\r\n"

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def read_records(
    source: Paths | Iterable[Any],
    *,
    format: str | Converter | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    report: RecordReport | None = None,
) -> list[Record]:
    """Read records from files or rows.

    Records that nothing can be learned from (equal responses, empty texts, ties, dialogues that differ too early) are
    left out, and a logged warning says how many and why.

    Args:
        source: Paths and globs of JSON Lines, JSON lists (both also as ``.gz``) and Parquet (``.parquet``, needs pyarrow); or any
            iterable of mappings, such as a list of dicts or a Hugging Face ``Dataset``.
        format: A key of ``FORMATS``, or a function from a row to a ``Record``; None detects the format from the
            fields of the first row.
        on_error: What to do with a row that is damaged or lacks a field: ``"raise"``, or ``"skip"`` and count it.
        report: If given, receives the counts of records that were left out.

    Raises:
        RecordError: A row cannot be used; the message names the file, the line and the field.
        ImportError: A Parquet file is given and pyarrow is not installed.
        ValueError: ``format`` is unknown, or no record is left.

    Example:
        >>> rows = [{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, {"prompt": "1 + 1?", "chosen": "2", "rejected": "2"}]
        >>> report = RecordReport()
        >>> read_records(rows, report=report)
        [Record(prompt='2 + 2?', chosen='4', rejected='5')]
        >>> dict(report.counts)
        {'identical': 1}
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error must be "raise" or "skip", got {on_error!r}')
    if isinstance(format, str) and format not in FORMATS:
        raise ValueError(f"format={format!r}: {did_you_mean(format, FORMATS)}")
    skipped = RecordReport()
    records: list[Record] = []
    convert = FORMATS[format] if isinstance(format, str) else format

    def refuse(error: RecordError, where: str) -> None:
        if error.reason not in LEFT_OUT and on_error == "raise":
            raise RecordError(
                error.reason,
                f'{error.detail}. Fix or remove this record, or pass on_error="skip" to count such records and continue.',
                where,
            ) from None
        skipped.add(error.reason, where, error.detail)

    seen = 0
    for where, row in _rows(source):
        seen += 1
        if isinstance(row, RecordError):
            refuse(row, where)
            continue
        try:
            if convert is None:
                convert = FORMATS[detect_format(row)]
            record = convert(row)
            found = fault(record)
            if found:
                raise RecordError(*found)
        except RecordError as error:
            refuse(error, where)
        else:
            records.append(record)
    if skipped.total:
        logger.warning("of %d records: %s", seen, skipped)
    if report is not None:
        report.merge(skipped)
    if not records:
        raise ValueError(f"{_name(source)} has no record to learn from: {skipped}")
    return records


def _name(source: Any) -> str:
    if isinstance(source, str | os.PathLike):
        return repr(os.fspath(source))
    return f"a {type(source).__name__}"


Row = Mapping[str, Any] | RecordError


def _rows(source: Any) -> Iterator[tuple[str, Row]]:
    """Yield each row, or the error in its place, with the place that it came from."""
    if isinstance(source, str | os.PathLike):
        yield from _file_rows((source,))
    elif isinstance(source, Mapping):
        raise ValueError(
            f"source must be rows, got a mapping with the keys {', '.join(map(repr, list(source)[:8]))}. Pass its rows, or one split "
            "of a dataset with splits"
        )
    else:
        iterator = iter(source)
        first = next(iterator, None)
        if isinstance(first, str | os.PathLike):
            yield from _file_rows((first, *iterator))
        elif first is not None:
            yield "row 1", _checked(first)
            for number, row in enumerate(iterator, start=2):
                yield f"row {number}", _checked(row)


def _checked(row: Any) -> Row:
    if isinstance(row, Mapping):
        return row
    return RecordError("wrong_type", f"a row must be a mapping of fields, got {type(row).__name__}")


def _file_rows(paths: Sequence[str | os.PathLike[str]]) -> Iterator[tuple[str, Row]]:
    for path in files.expand(files.as_paths(paths)):
        read = _parquet_rows if path.suffix == ".parquet" else _json_rows
        try:
            yield from read(path)
        except files.READ_ERRORS as error:
            yield str(path), RecordError("unreadable", f"cannot be read ({error})")


def _json_rows(path: pathlib.Path) -> Iterator[tuple[str, Row]]:
    with files.open_binary(path) as stream:
        lines = ((n, line) for n, line in enumerate(stream, 1) if line.strip(_BLANK))
        for number, line in lines:
            if line.lstrip(_BLANK).startswith(b"["):
                yield from _list_rows(path, line + stream.read(), number)
                return
            yield f"{path}:{number}", _parse(line)
            break
        else:
            yield str(path), RecordError("empty", "the file is empty")
        for number, line in lines:
            yield f"{path}:{number}", _parse(line)


def _parse(line: bytes) -> Row:
    try:
        return _checked(json.loads(line.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        return RecordError("not_utf8", f"not UTF-8 (byte 0x{line[error.start]:02x})")
    except (ValueError, RecursionError) as error:
        return RecordError("bad_json", f"not JSON ({error})")


def _list_rows(path: pathlib.Path, content: bytes, line: int) -> Iterator[tuple[str, Row]]:
    """Yield the items of a JSON list, each with its line; nothing after a damaged item is read."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        yield (
            f"{path}:{line}",
            RecordError("not_utf8", f"not UTF-8 (byte 0x{content[error.start]:02x})"),
        )
        return
    decoder = json.JSONDecoder()
    place, counted = text.index("[") + 1, 0
    while True:
        place = _after_space(text, place)
        if text.startswith("]", place):
            return
        line += text.count("\n", counted, place)
        counted = place
        try:
            item, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            yield f"{path}:{line}", RecordError("bad_json", f"not JSON ({error})")
            return
        yield f"{path}:{line}", _checked(item)
        place = _after_space(text, place)
        if text.startswith(",", place):
            place += 1
        elif not text.startswith("]", place):
            yield (
                f"{path}:{line}",
                RecordError("bad_json", "the list does not continue after this item"),
            )
            return


def _after_space(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def _parquet_rows(path: pathlib.Path) -> Iterator[tuple[str, Row]]:
    require("reading Parquet files", "pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True) as file:
            for batch in file.iter_batches(_PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:row {number}", row
    except (OSError, pa.ArrowException) as error:
        yield f"{path}:row {number + 1}", RecordError("unreadable", f"cannot be read ({error})")
