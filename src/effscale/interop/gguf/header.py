"""The header of a GGUF file: its metadata and the positions of its tensors; nothing in it is trusted.

The package ``gguf`` also has a reader, but it trusts every count in the file: one flipped bit can make it request more
memory than there is. So the header is read here, and the package is used only for the quantized formats.

References:
    ggml, "GGUF". https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import os
import pathlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from effscale.interop.foreign import Fields
from effscale.interop.tensors import FolderError, what_it_is

VERSIONS = (2, 3)
MAX_DIMS = 4
STRING, ARRAY = 8, 9
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
"""The format's numbers for types of metadata."""


@dataclass(frozen=True)
class Entry:
    """A tensor in the file.

    Attributes:
        shape: Its dimensions, slowest-varying first, as in NumPy and torch.
        kind: Its type, by ggml's number.
        start: Start of its data, from the beginning of the file.
        size: Size of its data in bytes.
    """

    shape: tuple[int, ...]
    kind: int
    start: int
    size: int

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """The shape of its data as bytes, in which a row is contiguous."""
        return (*self.shape[:-1], self.size // math.prod(self.shape[:-1]))


@dataclass(frozen=True)
class Header:
    """Everything in a GGUF file except the data of the tensors.

    Attributes:
        path: The file.
        metadata: Values by key; arrays are lists of strings or NumPy arrays.
        entries: The tensors by name.
    """

    path: pathlib.Path
    metadata: Mapping[str, Any]
    entries: Mapping[str, Entry]

    @property
    def fields(self) -> Fields:
        """The metadata, for reading by type."""
        return Fields(repr(str(self.path)), self.metadata)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a GGUF file.

    Raises:
        FolderError: The file cannot be read or is not a valid GGUF file: it is truncated, counts do not fit, a key or a
            tensor occurs twice, or tensors do not follow each other to the end of the file.
        ImportError: The package gguf is not installed.
    """
    path = pathlib.Path(path)
    try:
        with open(path, "rb") as stream:
            return _Parser(path, stream).header()
    except (OSError, UnicodeDecodeError, _UnsoundError) as error:
        kind = what_it_is(path)
        raise FolderError(
            f"{str(path)!r}: is not a valid GGUF file: "
            f"{error if kind in (None, 'this is a GGUF file') else kind}. Download or copy it again."
        ) from error


class _UnsoundError(Exception):
    """An error that describes what is wrong with the file."""


class _Parser:
    """Parse a header from front to back; every read is checked against what is left of the file."""

    def __init__(self, path: pathlib.Path, stream: BinaryIO):
        self.path, self.stream = path, stream
        self.left = self.size = os.fstat(stream.fileno()).st_size

    def header(self) -> Header:
        if self.take(4) != b"GGUF":
            raise _UnsoundError("it does not begin with GGUF")
        (version,) = struct.unpack("<I", self.take(4))
        if version not in VERSIONS:
            swapped = version & 0xFFFF == 0
            raise _UnsoundError(
                "it has the other byte order"
                if swapped
                else f"its version is {version}, but only {VERSIONS} are supported"
            )
        num_tensors, num_keys = struct.unpack("<QQ", self.take(16))
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.string()
            if key in metadata:
                raise _UnsoundError(f"the key {key!r} occurs twice")
            metadata[key] = self.value(self.uint32())
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise _UnsoundError(f"general.alignment must be a power of two, got {alignment!r}")
        found = [self.tensor() for _ in range(num_tensors)]
        return Header(self.path, metadata, self.entries(found, alignment))

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise _UnsoundError(
                f"at byte {self.size - self.left} it declares {count} bytes, but {self.left} are left"
            )
        data = self.stream.read(count)
        if len(data) != count:
            raise _UnsoundError("it changed while it was read")
        self.left -= count
        return data

    def uint32(self) -> int:
        return struct.unpack("<I", self.take(4))[0]

    def uint64(self) -> int:
        return struct.unpack("<Q", self.take(8))[0]

    def string(self) -> str:
        return self.take(self.uint64()).decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, length = self.uint32(), self.uint64()
            if kind == STRING:
                return [self.string() for _ in range(length)]
            return self.scalars(kind, length)
        return self.scalars(kind, 1)[0].item()

    def scalars(self, kind: int, length: int) -> np.ndarray:
        if kind not in SCALARS:
            raise _UnsoundError(f"it has metadata of the unknown type {kind}")
        dtype = np.dtype(SCALARS[kind])
        data = self.take(length * dtype.itemsize)
        if dtype == np.bool_ and max(data, default=0) > 1:
            raise _UnsoundError("a boolean is neither 0 nor 1")
        return np.frombuffer(data, dtype)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, num_dims = self.string(), self.uint32()
        if not 1 <= num_dims <= MAX_DIMS:
            raise _UnsoundError(f"the tensor {name!r} has {num_dims} dimensions")
        shape = struct.unpack(f"<{num_dims}Q", self.take(8 * num_dims))[::-1]
        if 0 in shape:
            raise _UnsoundError(f"the tensor {name!r} has the shape {list(shape)}")
        return name, shape, self.uint32(), self.uint64()

    def entries(
        self, found: list[tuple[str, tuple[int, ...], int, int]], alignment: int
    ) -> Mapping[str, Entry]:
        """Place the tensors: each begins at the end of the previous one, rounded up, as ggml requires."""
        pad = lambda place: -(-place // alignment) * alignment
        entries: dict[str, Entry] = {}
        start = first = pad(self.size - self.left)
        end = first
        for name, shape, kind, offset in found:
            if name in entries:
                raise _UnsoundError(f"the tensor {name!r} occurs twice")
            per_block, block_bytes = _block(kind, name)
            if shape[-1] % per_block:
                raise _UnsoundError(
                    f"the rows of {name!r} are not a multiple of its type's block size {per_block}"
                )
            if first + offset != start:
                raise _UnsoundError(
                    f"the tensor {name!r} begins at {offset} instead of {start - first}"
                )
            size = math.prod(shape) // per_block * block_bytes
            entries[name] = Entry(shape, kind, start, size)
            end = start + size
            start = pad(end)
        if not end <= self.size < end + alignment:
            raise _UnsoundError(f"its tensors end at byte {end}, but it has {self.size} bytes")
        return entries


def _block(kind: int, name: str) -> tuple[int, int]:
    """Return the number of elements and of bytes per block of this type."""
    gguf = import_gguf()
    try:
        return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    except (KeyError, ValueError) as error:
        raise _UnsoundError(
            f"the tensor {name!r} has the type {kind}, which the installed gguf package does not support"
        ) from error


def import_gguf() -> Any:
    """Import the package gguf.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise ImportError(
            "reading GGUF files needs gguf: install it with pip install gguf"
        ) from error
    return gguf
