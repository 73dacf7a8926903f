"""Paths, globs and byte streams, shared by the sources that read files."""

import glob
import gzip
import hashlib
import io
import os
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import cast

BLOCK = 1 << 20
# The errors of reading a file; a damaged gzip file can raise any of the three.
READ_ERRORS = (OSError, EOFError, zlib.error)


def as_paths(paths: "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]") -> tuple[str, ...]:
    """Return one or several paths as a tuple of strings."""
    if isinstance(paths, (str, os.PathLike)):
        paths = (paths,)
    result = tuple(os.fspath(path) for path in paths)
    if not result:
        raise ValueError("paths must have at least one path or glob, got ()")
    return result


def expand(paths: Sequence[str]) -> list[pathlib.Path]:
    """Return the files that paths and globs match, each once; those of a glob are sorted.

    Raises:
        FileNotFoundError: A path or glob matches nothing.
        ValueError: A path is a folder.
    """
    found: dict[pathlib.Path, None] = {}
    for pattern in paths:
        if os.path.isdir(pattern):
            raise ValueError(
                f"{pattern}: is a folder. Match its files with a glob, such as "
                f"{os.path.join(pattern, '**', '*.txt')!r}."
            )
        matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        files = sorted(pathlib.Path(match) for match in matches if not os.path.isdir(match))
        if not files:
            raise FileNotFoundError(
                f"no file matches {pattern!r} (working folder {os.getcwd()!r}). "
                "Globs can contain *, ? and **."
            )
        found.update(dict.fromkeys(files))
    return list(found)


def fingerprint(paths: Sequence[str]) -> str:
    """Return a digest of the names, sizes and modification times of the files."""
    digest = hashlib.blake2b(digest_size=16)
    for path in expand(paths):
        status = path.stat()
        digest.update(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def open_binary(path: pathlib.Path) -> io.BufferedIOBase:
    """Open a file for reading bytes, decompressing it if its name ends in ``.gz``."""
    return cast(
        io.BufferedIOBase, gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")
    )


def split_stream(
    stream: io.BufferedIOBase, separator: bytes | None, limit: int
) -> Iterator[tuple[int, bytes]]:
    """Yield the line number and the bytes of each piece between separators.

    A piece longer than ``limit`` is cut at the last line end before the limit, or else between two
    characters, so that memory stays bounded for any file. The pieces and separators concatenate
    to the stream, byte for byte.
    """
    buffer, line = b"", 1
    while True:
        block = stream.read(BLOCK)
        buffer += block
        start = 0
        while start < len(buffer):
            found = (
                buffer.find(separator, start, start + limit + len(separator)) if separator else -1
            )
            if found >= 0:
                stop, following = found, found + len(separator or b"")
            elif len(buffer) - start > limit + len(separator or b""):
                stop = following = _cut(buffer, start, start + limit)
            elif not block:
                stop = following = len(buffer)
            else:
                break
            yield line, buffer[start:stop]
            line += buffer.count(b"\n", start, following)
            start = following
        buffer = buffer[start:]
        if not block:
            return


def _cut(buffer: bytes, start: int, stop: int) -> int:
    newline = buffer.rfind(b"\n", start, stop)
    if newline >= 0:
        return newline + 1
    # 0b10xxxxxx is a continuation byte; a character has at most three such bytes.
    for cut in range(stop, max(start, stop - 4), -1):
        if buffer[cut] & 0xC0 != 0x80:
            return cut
    return stop
