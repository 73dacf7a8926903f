r"""Megatron's indexed datasets: a ``.bin`` file of values, and an ``.idx`` file that divides them into items.

Corpora of Megatron-LM and Megatron-DeepSpeed use this format, and so do the indexes of DeepSpeed's data analyzer.
An ``.idx`` file is little-endian, without padding, and contains: the magic bytes ``MMIDIDX\0\0``; uint64 version 1; uint8 type
of the values; uint64 number of items; uint64 number of document boundaries; for each item, an int32 length in values; for each
item, an int64 position in the ``.bin`` in bytes; and the int64 document boundaries, in items. Nothing is unpickled.
"""

import functools
import hashlib
import os
import pathlib
import struct
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, Integer

from effscale.data.store import TokenStore, Verify, check_verify, manifest_digest
from effscale.data.verified import verify_once

HEADER = struct.Struct("<9sQBQQ")
MAGIC, VERSION = b"MMIDIDX\0\0", 1
WINDOWS, WINDOW = 64, 4096

# The size of the .bin decides where one code means different types in different programs. In Megatron-LM, 6 and 7 are
# floats, which cannot be tokens or sample numbers, and 8 is uint16, where DeepSpeed has uint64.
TYPES = {
    1: ("u1",),
    2: ("i1",),
    3: ("<i2",),
    4: ("<i4",),
    5: ("<i8",),
    6: ("<u2",),
    7: ("<u4",),
    8: ("<u2", "<u8"),
}


class CorruptIndexedDataError(RuntimeError):
    """An indexed dataset is damaged, or the file is not one.

    Attributes:
        file: The damaged file.
        field: The part of it that is wrong.
    """

    def __init__(self, file: str | os.PathLike[str], field: str, expected: str, found: object):
        super().__init__(
            f"{os.fspath(file)}: corrupt indexed dataset, {field}: expected {expected}, found {found}"
        )
        self.file, self.field = pathlib.Path(file), field


class IndexedData(NamedTuple):
    """An indexed dataset; item ``i`` is ``values[bounds[i]:bounds[i + 1]]``.

    Attributes:
        values: The values of all items, memory-mapped and read-only.
        bounds: The boundaries of the items, one more than the number of items.
        documents: The document boundaries, in items.
    """

    values: Integer[np.ndarray, " values"]
    bounds: Int64[np.ndarray, " items_and_one"]
    documents: Int64[np.ndarray, " boundaries"]


def read_indexed(prefix: str | os.PathLike[str]) -> IndexedData:
    """Read ``prefix.idx``, check that it fits ``prefix.bin``, and memory-map the values.

    Items must be contiguous, as all known writers store them.

    Args:
        prefix: The path without ``.idx`` and ``.bin``.

    Raises:
        FileNotFoundError: One of the files is missing.
        CorruptIndexedDataError: A file is truncated or altered, or not of this format.
    """
    index, data = (_existing(prefix, suffix) for suffix in (".idx", ".bin"))
    size, data_size = index.stat().st_size, data.stat().st_size
    with open(index, "rb") as stream:
        header = stream.read(HEADER.size)
        if len(header) < HEADER.size:
            raise CorruptIndexedDataError(
                index, "header", f"{HEADER.size} bytes", f"{len(header)} bytes"
            )
        magic, version, code, num_items, num_boundaries = HEADER.unpack(header)
        for field, found, wanted in (("magic", magic, MAGIC), ("version", version, VERSION)):
            if found != wanted:
                raise CorruptIndexedDataError(index, field, repr(wanted), repr(found))
        if code not in TYPES:
            raise CorruptIndexedDataError(index, "type of values", f"one of {[*TYPES]}", code)
        # Check the size before allocating arrays of that many items.
        wanted = HEADER.size + 12 * num_items + 8 * num_boundaries
        if size != wanted:
            raise CorruptIndexedDataError(
                index,
                "size",
                f"{wanted} bytes for {num_items} items and {num_boundaries} document boundaries",
                f"{size} bytes",
            )
        lengths = np.fromfile(stream, "<i4", num_items)
        places = np.fromfile(stream, "<i8", num_items)
        documents = np.fromfile(stream, "<i8", num_boundaries)
    if num_items and lengths.min() < 0:
        raise CorruptIndexedDataError(index, "lengths", "none below 0", int(lengths.min()))
    bounds = np.zeros(num_items + 1, np.int64)
    np.cumsum(lengths, out=bounds[1:])
    total = int(bounds[-1])
    types = [np.dtype(name) for name in TYPES[code]]
    fitting = [dtype for dtype in types if total * dtype.itemsize == data_size]
    if not fitting:
        sizes = " or ".join(f"{total * t.itemsize} bytes for {total} of {t}" for t in types)
        raise CorruptIndexedDataError(data, "size", sizes, f"{data_size} bytes")
    dtype = fitting[0]
    wrong = np.flatnonzero(places != bounds[:-1] * dtype.itemsize)
    if wrong.size:
        item = int(wrong[0])
        place = int(bounds[item]) * dtype.itemsize
        raise CorruptIndexedDataError(
            index,
            f"position of item {item}",
            f"byte {place}, right after the previous item",
            places[item],
        )
    _check_documents(index, documents, num_items)
    values = np.memmap(data, dtype, mode="r") if total else np.zeros(0, dtype)
    return IndexedData(values, bounds, documents)


class MegatronTokens(TokenStore):
    """A corpus written by Megatron's ``preprocess_data.py``, for use in place of a `TokenStore`.

    `PackedTokens`, `packed_rows`, `make_dataset` and `token_counts` accept it directly; nothing is converted. A document is
    what Megatron calls a document, regardless of the number of sentences it was split into; empty ones are left out.

    Rows packed from it differ from the samples that Megatron's ``GPTDataset`` cuts and shuffles. A difficulty index made for
    those samples does not apply to these rows.

    Corpora are distinguished by a digest of the whole ``.idx`` and of 64 windows of 4 KiB, spread evenly over the ``.bin``, as
    reading terabytes on opening would take too long. A small change between the windows is not noticed.

    >>> import pathlib, struct, tempfile
    >>> prefix = tempfile.mkdtemp() + "/corpus"
    >>> tokens = [5, 6, 0, 7, 0]
    >>> _ = pathlib.Path(prefix + ".bin").write_bytes(struct.pack("<5H", *tokens))
    >>> _ = pathlib.Path(prefix + ".idx").write_bytes(
    ...     struct.pack("<9sQBQQ2i2q3q", b"MMIDIDX", 1, 8, 2, 3, *(3, 2), *(0, 6), *(0, 1, 2)))
    >>> corpus = MegatronTokens.open(prefix, vocab_size=10, eos_token_id=0)
    >>> corpus.num_documents, corpus.document(1).tolist()
    (2, [7, 0])
    """

    def __init__(
        self,
        prefix: pathlib.Path,
        *,
        vocab_size: int,
        eos_token_id: int | None,
        tokenizer_digest: str | None,
        verify: Verify = "once",
    ):
        self.folder, self._verify = prefix, verify  # messages name the prefix
        self.tokens, bounds, documents = read_indexed(prefix)
        index = _existing(prefix, ".idx")
        if documents[-1] != len(bounds) - 1:
            raise CorruptIndexedDataError(
                index, "last document boundary", f"{len(bounds) - 1} items", documents[-1]
            )
        self.offsets = np.unique(bounds[documents])
        with open(index, "rb") as stream:
            digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16))
        self.manifest = {
            "format": "megatron-indexed",
            "version": VERSION,
            "dtype": self.tokens.dtype.str,
            "num_tokens": len(self.tokens),
            "num_documents": len(self.offsets) - 1,
            "empty_documents": len(documents) - len(self.offsets),
            "vocab_size": vocab_size,
            "eos_id": eos_token_id,
            "tokenizer": tokenizer_digest,
            "metadata": {},
            "files": {
                ".idx": {"bytes": index.stat().st_size, "blake2b": digest.hexdigest()},
                ".bin": {
                    "bytes": self.tokens_path.stat().st_size,
                    "blake2b_of_windows": _digest_of_windows(self.tokens_path),
                },
            },
        }
        self.manifest["digest"] = manifest_digest(self.manifest)

    @classmethod
    def open(  # pyrefly: ignore[bad-override] the files lack what the arguments provide
        cls,
        prefix: str | os.PathLike[str],
        *,
        vocab_size: int,
        eos_token_id: int | None = None,
        tokenizer_digest: str | None = None,
        verify: Verify = "once",
    ) -> "MegatronTokens":
        """Open a corpus after checking it.

        Args:
            prefix: The path without ``.idx`` and ``.bin``, such as ``.../my-corpus_text_document``.
            vocab_size: An upper bound on the ids (exclusive). The files do not contain it.
            eos_token_id: The token at the end of each document, if ``--append-eod`` added one.
            tokenizer_digest: The result of `tokenizer_digest`, to distinguish corpora with different tokenizers.
            verify: ``"full"`` reads all tokens, at the speed of the disk, and checks that they are in the
                vocabulary. ``"once"`` does the same unless this machine has already done it since the file last changed.
                ``"size"`` only compares the files with one another. The format has no checksums, so changes within the
                vocabulary are not detected.

        Raises:
            FileNotFoundError: One of the files is missing.
            CorruptIndexedDataError: A file is truncated or altered, or contains ids outside the vocabulary.
            ValueError: An argument is out of range.
        """
        check_verify(verify)
        if vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {vocab_size}")
        if eos_token_id is not None and not 0 <= eos_token_id < vocab_size:
            raise ValueError(
                f"eos_token_id must be from 0 to vocab_size-1={vocab_size - 1}, got {eos_token_id}"
            )
        path = pathlib.Path(prefix).absolute()
        corpus = cls(
            path,
            vocab_size=vocab_size,
            eos_token_id=eos_token_id,
            tokenizer_digest=tokenizer_digest,
            verify=verify,
        )
        if verify == "once":
            promises = {"vocab_size": vocab_size, "dtype": corpus.tokens.dtype.str}
            verify_once(corpus.tokens_path, corpus._check_ids, promises)
        elif verify == "full":
            corpus._check_ids()
        return corpus

    @property
    def tokens_path(self) -> pathlib.Path:
        """The file that contains the tokens."""
        return _existing(self.folder, ".bin")

    def _check_ids(self) -> None:
        for chunk in self.chunks():
            for token in (chunk.min(), chunk.max()):
                if not 0 <= token < self.vocab_size:
                    raise CorruptIndexedDataError(
                        self.tokens_path, "tokens", f"ids below vocab_size={self.vocab_size}", token
                    )

    def __repr__(self) -> str:
        return super().__repr__().replace("TokenStore", "MegatronTokens", 1)

    def __reduce__(self):  # pyrefly: ignore[bad-override]
        known = {
            "vocab_size": self.vocab_size,
            "eos_token_id": self.eos_token_id,
            "tokenizer_digest": self.manifest["tokenizer"],
        }
        open_again = functools.partial(MegatronTokens.open, verify=self._verify_again, **known)
        return open_again, (self.folder,)


def _existing(prefix: str | os.PathLike[str], suffix: str) -> pathlib.Path:
    path = pathlib.Path(os.fspath(prefix) + suffix)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: file not found. Pass the path of an indexed dataset without .idx and .bin."
        )
    return path


def _digest_of_windows(path: pathlib.Path) -> str:
    """Return a digest of windows spread over a file, its first and last bytes included; of all bytes if the file is small."""
    digest, size = hashlib.blake2b(digest_size=16), path.stat().st_size
    with open(path, "rb") as stream:
        if size <= WINDOWS * WINDOW:
            digest.update(stream.read())
        else:
            for number in range(WINDOWS):
                stream.seek(number * (size - WINDOW) // (WINDOWS - 1))
                digest.update(stream.read(WINDOW))
    return digest.hexdigest()


def _check_documents(index: pathlib.Path, documents: np.ndarray, num_items: int) -> None:
    if not documents.size or documents[0] != 0:
        found = int(documents[0]) if documents.size else "none"
        raise CorruptIndexedDataError(index, "document boundaries", "0 as the first", found)
    if documents[-1] > num_items or (np.diff(documents) < 0).any():
        raise CorruptIndexedDataError(
            index,
            "document boundaries",
            f"increasing numbers up to {num_items}",
            f"up to {documents.max()}",
        )
