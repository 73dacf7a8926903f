"""Safetensors files, read one tensor at a time and without torch."""

import json
import os
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from effscale.interop.tensors import DTYPES, FolderError, TensorInfo, what_it_is

PREFIX = "effscale."
"""Prefix of effscale's keys in the metadata of a file."""

CHECKSUMS = f"{PREFIX}tensors_crc32"
"""The metadata key for the checksums of the file's tensors, as JSON."""

METADATA = "__metadata__"
"""The header's entry for metadata; among the checksums, the one for effscale's other metadata keys."""

CODES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
"""The format's names of the supported types."""


class _Entry(NamedTuple):
    code: str
    start: int
    stop: int


class SafetensorsFile:
    """One safetensors file; see ``effscale.interop.tensors.Tensors``.

    The ``safetensors`` library validates the header: lengths, offsets without gaps or overlaps, and
    shapes that fit them. Data is then read with plain reads instead of a memory map: the pages of
    a map count as resident memory until it is closed, and a file that is truncated while it is mapped
    kills the process.

    Files written by ``effscale.interop.files.writer`` carry a checksum of every tensor (its name, type,
    shape and data), so any damage to them is detected. Other files carry none: damage to
    their header is detected unless the result is a valid header again, and a flipped bit in
    their data cannot be detected.

    Attributes:
        metadata: effscale's texts in the header, by key; see ``effscale.interop.files.writer.write_tensors``.

    Raises:
        FolderError: The file cannot be read or is not a valid safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        try:
            with safe_open(self.path, framework="numpy"), open(self.path, "rb") as stream:
                self._identity = identity(stream.fileno())
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length), object_pairs_hook=_without_duplicates)
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise self._unsound(what_it_is(path) or str(error)) from error
        metadata = header.pop(METADATA, {})
        self._entries = {
            name: _Entry(entry["dtype"], *(8 + length + place for place in entry["data_offsets"]))
            for name, entry in header.items()
        }
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(tuple(entry["shape"]), CODES.get(entry["dtype"], np.dtype("V")))
            for name, entry in header.items()
        }
        others = {
            key: text
            for key, text in metadata.items()
            if key.startswith(PREFIX) and key != CHECKSUMS
        }
        self._checksums = self._parse_checksums(metadata, others)
        self.metadata: Mapping[str, str] = others if self._checksums else {}

    def read(self, name: str) -> np.ndarray:
        """Read one tensor, as a read-only array.

        Raises:
            FolderError: The tensor does not exist, its type is not supported, the file changed since it
                was opened, or the data does not match the checksum.
        """
        if name not in self.infos:
            raise FolderError(f"{str(self.path)!r}: no tensor {name!r}.")
        info, entry = self.infos[name], self._entries[name]
        if info.dtype not in DTYPES:
            raise FolderError(
                f"{str(self.path)!r}: the tensor {name!r} has the type {entry.code}, which is not supported. "
                f"Convert it to one of {', '.join(CODES)}."
            )
        data = np.empty(entry.stop - entry.start, np.uint8)
        try:
            with open(self.path, "rb") as stream:
                same = identity(stream.fileno()) == self._identity
                stream.seek(entry.start)
                count = stream.readinto(data.data)
        except OSError as error:
            raise self._unsound(f"tensor {name!r} cannot be read ({error})") from error
        if not same or count != data.size:
            raise FolderError(
                f"{str(self.path)!r}: changed after it was opened. Open the folder again when "
                "no process writes to it."
            )
        if (
            self._checksums
            and checksum(name, entry.code, info.shape, data) != self._checksums[name]
        ):
            raise self._unsound(f"the data of tensor {name!r} does not match its checksum")
        if info.dtype == np.bool_ and data.max(initial=0) > 1:
            raise self._unsound(f"the boolean tensor {name!r} has bytes other than 0 and 1")
        data.flags.writeable = False
        return data.view(info.dtype).reshape(info.shape)

    def _parse_checksums(
        self, metadata: Mapping[str, str], others: Mapping[str, str]
    ) -> Mapping[str, int]:
        # If a bit of one half of the key has flipped, the other half reveals it.
        parts = CHECKSUMS.split(".")
        ours = [key for key in metadata if any(p in key for p in parts) and key not in others]
        if not ours and not others:
            return {}
        if ours != [CHECKSUMS]:
            unknown = next(iter(key for key in (*ours, *others) if key != CHECKSUMS))
            raise self._unsound(f"its metadata has the unknown key {unknown!r}")
        try:
            checksums = json.loads(metadata[CHECKSUMS], object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise self._unsound(f"its checksums cannot be read ({error})") from error
        of_others = checksums.pop(METADATA, None) if isinstance(checksums, dict) else None
        if not isinstance(checksums, dict) or checksums.keys() != self.infos.keys():
            raise self._unsound("its checksums and its tensors have different names")
        if of_others != (text_checksum(others) if others else None):
            raise self._unsound("its metadata does not match its checksum")
        return checksums

    def _unsound(self, reason: str) -> FolderError:
        return FolderError(
            f"{str(self.path)!r}: is not a valid safetensors file: {reason}. "
            "Download or copy it again, or write it again from the original model."
        )


def checksum(name: str, code: str, shape: tuple[int, ...], data: np.ndarray) -> int:
    """Return the CRC-32 of a tensor's name, type, shape and bytes."""
    start = zlib.crc32(json.dumps([name, code, list(shape)]).encode())
    return zlib.crc32(data.data, start)


def text_checksum(metadata: Mapping[str, str]) -> int:
    """Return the CRC-32 of keys and texts."""
    return zlib.crc32(json.dumps(sorted(metadata.items())).encode())


def identity(descriptor: int) -> tuple[int, ...]:
    """Return what changes when an open file is written to or another file takes its name."""
    status = os.fstat(descriptor)
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the header names {twice!r} twice")
    return result
