r"""Megatron's indexed data sets: a ``.bin`` of values, and an ``.idx`` that says which of them belong together.

Corpora of Megatron-LM and Megatron-DeepSpeed have this format, and so have the indexes of DeepSpeed's data analyzer.
Little-endian and without gaps, an ``.idx`` holds: the magic ``MMIDIDX\0\0``; uint64 version 1; uint8 type of the values;
uint64 number of items; uint64 number of document boundaries; an int32 length for each item, in values; an int64 place for
each item in the ``.bin``, in bytes; and the int64 document boundaries, in items. Nothing is unpickled.
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

# Of what one code means in different programs, the size of the .bin tells. Megatron-LM has floats under 6 and 7,
# which no token or sample number is, and uint16 under 8, where DeepSpeed has uint64.
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
    """An indexed data set is damaged, or not one.

    Attributes:
        file: The file at fault.
        field: What in it is wrong.
    """

    def __init__(self, file: str | os.PathLike[str], field: str, expected: str, found: object):
        super().__init__(
            f"corrupt indexed data set: {os.fspath(file)!r}: {field}: expected {expected}, found {found}"
        )
        self.file, self.field = pathlib.Path(file), field


class IndexedData(NamedTuple):
    """An indexed data set; item ``i`` is ``values[bounds[i]:bounds[i + 1]]``.

    Attributes:
        values: The values of all items, memory-mapped, read only.
        bounds: Where items begin and end, one more than there are items.
        documents: The document boundaries, in items.
    """

    values: Integer[np.ndarray, " values"]
    bounds: Int64[np.ndarray, " items_and_one"]
    documents: Int64[np.ndarray, " boundaries"]


def read_indexed(prefix: str | os.PathLike[str]) -> IndexedData:
    """Reads ``prefix.idx``, checks that it fits ``prefix.bin``, and maps that.

    Items must lie one behind the other, as all known writers put them.

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
        # Before anything of that many items is allocated.
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
            index, f"place of item {item}", f"byte {place}, behind the item before", places[item]
        )
    _check_documents(index, documents, num_items)
    values = np.memmap(data, dtype, mode="r") if total else np.zeros(0, dtype)
    return IndexedData(values, bounds, documents)


class MegatronTokens(TokenStore):
    """A corpus that Megatron's ``preprocess_data.py`` wrote, in place of a :class:`TokenStore`.

    `PackedTokens`, `packed_rows`, `make_dataset` and `token_counts` take it as it is; nothing is converted. A document is
    what Megatron calls one, however many sentences it was cut into; empty ones are left out.

    Rows that are packed from it are other rows than the samples that Megatron's ``GPTDataset`` cuts and shuffles: a
    difficulty index that was made of those numbers other things.

    The digest that tells corpora apart is of the whole ``.idx`` and, as reading terabytes to open them would take too long,
    of 64 windows of 4 KiB that are spread evenly over the ``.bin``. A small change between them is not noticed.

    >>> import pathlib, struct, tempfile
    >>> prefix = tempfile.mkdtemp() + "/corpus"
    >>> tokens = [5, 6, 0, 7, 0]
    >>> _ = pathlib.Path(prefix + ".bin").write_bytes(struct.pack("<5H", *tokens))
    >>> _ = pathlib.Path(prefix + ".idx").write_bytes(
    ...     struct.pack("<9sQBQQ2i2q3q", b"MMIDIDX", 1, 8, 2, 3, *(3, 2), *(0, 6), *(0, 1, 2)))
    >>> corpus = MegatronTokens.open(prefix, vocab_size=10, eos_id=0)
    >>> corpus.num_documents, corpus.document(1).tolist()
    (2, [7, 0])
    """

    def __init__(
        self,
        prefix: pathlib.Path,
        *,
        vocab_size: int,
        eos_id: int | None,
        tokenizer_digest: str | None,
        verify: Verify = "once",
    ):
        self.folder, self._verify = prefix, verify  # the prefix is what messages name
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
            "eos_id": eos_id,
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
    def open(  # pyrefly: ignore[bad-override] the files do not say what the arguments do
        cls,
        prefix: str | os.PathLike[str],
        *,
        vocab_size: int,
        eos_id: int | None = None,
        tokenizer_digest: str | None = None,
        verify: Verify = "once",
    ) -> "MegatronTokens":
        """Opens a corpus after checking it.

        Args:
            prefix: The path without ``.idx`` and ``.bin``, such as ``.../my-corpus_text_document``.
            vocab_size: Every id is below it. The files do not say it.
            eos_id: The token at the end of each document, if ``--append-eod`` put one there.
            tokenizer_digest: From `tokenizer_digest`, to tell corpora of different tokenizers apart.
            verify: ``"full"`` reads all tokens, as fast as the disk gives them, and checks that they are in the
                vocabulary. ``"once"`` does so unless this machine has done it since the file last changed. ``"size"`` only
                compares the files with one another. The format has no checksums, so changes within the
                vocabulary are not found.

        Raises:
            FileNotFoundError: One of the files is missing.
            CorruptIndexedDataError: A file is truncated or altered, or holds ids outside of the vocabulary.
            ValueError: An argument is out of range.
        """
        check_verify(verify)
        if vocab_size < 1:
            raise ValueError(f"vocab_size={vocab_size}: it must be at least 1.")
        if eos_id is not None and not 0 <= eos_id < vocab_size:
            raise ValueError(
                f"eos_id={eos_id}: it must be from 0 to vocab_size-1={vocab_size - 1}."
            )
        path = pathlib.Path(prefix).absolute()
        corpus = cls(
            path,
            vocab_size=vocab_size,
            eos_id=eos_id,
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
        """The file of the tokens."""
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
            "eos_id": self.eos_id,
            "tokenizer_digest": self.manifest["tokenizer"],
        }
        open_again = functools.partial(MegatronTokens.open, verify=self._verify_again, **known)
        return open_again, (self.folder,)


def _existing(prefix: str | os.PathLike[str], suffix: str) -> pathlib.Path:
    path = pathlib.Path(os.fspath(prefix) + suffix)
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {str(path)!r}: give the path of an indexed data set without its .idx and .bin."
        )
    return path


def _digest_of_windows(path: pathlib.Path) -> str:
    """Of a file's first and last bytes and of some between them; of all bytes if it is small."""
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
        raise CorruptIndexedDataError(index, "document boundaries", "a first one of 0", found)
    if documents[-1] > num_items or (np.diff(documents) < 0).any():
        raise CorruptIndexedDataError(
            index,
            "document boundaries",
            f"rising numbers up to {num_items}",
            f"up to {documents.max()}",
        )
