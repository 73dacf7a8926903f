"""A token store: a corpus as token ids, in a folder that is written once and memory-mapped.

The folder contains ``tokens.bin`` (all ids, little-endian uint16, or uint32 for more than 65536 ids),
``offsets.bin`` (int64; document ``i`` is ``tokens[offsets[i]:offsets[i + 1]]``) and
``manifest.json`` (counts, the tokenizer's digest, the source of the text, sizes and digests).
"""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Integer

from effscale.data.verified import verify_once

TOKENS, OFFSETS, MANIFEST = "tokens.bin", "offsets.bin", "manifest.json"
FORMAT, VERSION = "effscale-token-store", 1
OFFSET_DTYPE = np.dtype("<i8")
READ_BYTES = 1 << 22

Verify = Literal["once", "size", "full"]
"""How a folder is checked when it is opened: contents once per machine, only the sizes, or contents every time."""


class CorruptTokenStoreError(RuntimeError):
    """A token store is damaged: truncated, altered or incomplete.

    Attributes:
        file: The damaged file.
        expected: What the manifest states.
        found: What was found.
    """

    def __init__(self, file: os.PathLike[str], expected: str, found: str):
        super().__init__(
            f"{os.fspath(file)}: corrupt token store, expected {expected}, found {found}. "
            "Delete the folder and build the store again."
        )
        self.file, self.expected, self.found = pathlib.Path(file), expected, found


class TokenStore:
    """Read access to a token store. Create it with `open`.

    It can be pickled for data-loading processes: the pickle contains only the path of the folder and how to verify it.

    Attributes:
        folder: The folder of the store.
        manifest: The content of ``manifest.json``.
        tokens: All token ids, memory-mapped and read-only.
        offsets: The boundaries of the documents, one more than the number of documents.
    """

    folder: pathlib.Path
    manifest: dict[str, Any]
    tokens: Integer[np.ndarray, " tokens"]
    offsets: Integer[np.ndarray, " boundaries"]

    def __init__(self, folder: pathlib.Path, manifest: dict[str, Any], verify: Verify = "once"):
        self.folder, self.manifest, self._verify = folder, manifest, verify
        self.tokens = _map(folder / TOKENS, np.dtype(manifest["dtype"]))
        self.offsets = _map(folder / OFFSETS, OFFSET_DTYPE)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, verify: Verify = "once") -> "TokenStore":
        """Open a store after checking it.

        Args:
            folder: The store's folder.
            verify: ``"full"`` reads the files, at about 1 GB/s, compares their digests with the manifest and checks
                that all ids are in the vocabulary. ``"once"`` does the same unless this machine has already done it since the
                files last changed, so that later opens cost nothing; see ``effscale.data.verified``. ``"size"`` only compares
                the sizes of the files.

        Raises:
            FileNotFoundError: The folder does not exist.
            CorruptTokenStoreError: A file is missing, truncated or altered.
        """
        check_verify(verify)
        path = pathlib.Path(folder).absolute()
        if not path.is_dir():
            raise FileNotFoundError(
                f"{path}: no token store found. Build one with write_store or prepare_corpus."
            )
        manifest = read_manifest(
            path / MANIFEST, FORMAT, VERSION, CorruptTokenStoreError, "build the store again"
        )
        for name in (TOKENS, OFFSETS):
            _check_size(path / name, manifest["files"][name]["bytes"])
        store = cls(path, manifest, verify)
        first, last = int(store.offsets[0]), int(store.offsets[-1])
        if (first, last) != (0, store.num_tokens):
            raise CorruptTokenStoreError(
                path / OFFSETS, f"offsets from 0 to {store.num_tokens}", f"{first} to {last}"
            )
        for name in (TOKENS, OFFSETS):
            check = functools.partial(store._check_content, name)
            if verify == "once":
                promises = {"digest": manifest["digest"], "file": name}
                verify_once(path / name, check, promises)
            elif verify == "full":
                check()
        return store

    @property
    def tokens_path(self) -> pathlib.Path:
        """The file that contains the tokens."""
        return self.folder / TOKENS

    @property
    def num_tokens(self) -> int:
        """The number of tokens, including separators."""
        return self.manifest["num_tokens"]

    @property
    def num_documents(self) -> int:
        """The number of documents."""
        return self.manifest["num_documents"]

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary; every id is smaller."""
        return self.manifest["vocab_size"]

    @property
    def eos_token_id(self) -> int | None:
        """The token at the end of each document, if there is one."""
        return self.manifest["eos_id"]

    def document(self, index: int) -> Integer[np.ndarray, " length"]:
        """Return the ids of one document, including its separator."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"index must be from 0 to {self.num_documents - 1}, got {index}")
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def chunks(self, size: int = 1 << 22) -> Iterator[Integer[np.ndarray, " chunk"]]:
        """Yield all tokens in order, ``size`` at a time, with plain reads.

        Unlike the pages of a memory map, data read this way does not add to the resident memory of the process.
        """
        with open(self.tokens_path, "rb") as stream:
            while block := stream.read(size * self.tokens.dtype.itemsize):
                yield np.frombuffer(block, self.tokens.dtype)

    def __repr__(self) -> str:
        return (
            f"TokenStore({str(self.folder)!r}, num_tokens={self.num_tokens}, "
            f"num_documents={self.num_documents}, vocab_size={self.vocab_size})"
        )

    def __reduce__(self):
        return functools.partial(TokenStore.open, self.folder, verify=self._verify_again), ()

    @property
    def _verify_again(self) -> Verify:
        """Return how a worker process verifies; it does not repeat the full check of its parent."""
        return "size" if self._verify == "size" else "once"

    def _check_content(self, name: str) -> None:
        """Compare a file with its digest, and tokens with the vocabulary, in one pass."""
        path, digest, largest = self.folder / name, hashlib.blake2b(digest_size=16), 0
        with open(path, "rb") as stream:
            while block := stream.read(READ_BYTES):
                digest.update(block)
                if name == TOKENS:
                    largest = max(largest, int(np.frombuffer(block, self.tokens.dtype).max()))
        expected = self.manifest["files"][name]["blake2b"]
        if digest.hexdigest() != expected:
            raise CorruptTokenStoreError(path, f"blake2b {expected}", digest.hexdigest())
        if largest >= self.vocab_size:
            raise CorruptTokenStoreError(path, f"ids below {self.vocab_size}", f"{largest}")


def check_verify(verify: Verify) -> None:
    """Raise a ValueError unless ``verify`` is valid."""
    if verify not in get_args(Verify):
        raise ValueError(f'verify must be "once", "size" or "full", got {verify!r}')


def manifest_digest(manifest: dict[str, Any]) -> str:
    """Return the digest of a manifest without its ``digest`` entry."""
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_manifest(
    path: pathlib.Path,
    kind: str,
    version: int,
    corrupt: Callable[[pathlib.Path, str, str], Exception],
    again: str,
) -> dict[str, Any]:
    """Read and check the manifest of a folder that was written once.

    Args:
        path: The manifest file.
        kind: The required ``format``.
        version: The supported ``version``.
        corrupt: Creates the error for a damaged file from the file, what was expected and what was found.
        again: The advice for an unsupported version.
    """
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise corrupt(path, "a manifest", "no file") from None
    except ValueError as error:
        raise corrupt(path, "a manifest in JSON", f"{error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != kind:
        raise corrupt(path, f"format {kind!r}", "another or none")
    if manifest.get("version") != version:
        raise ValueError(
            f"{path}: format version {manifest.get('version')!r} is not supported; this effscale reads "
            f"version {version}. To use it, {again}, or use the effscale version that wrote it."
        )
    digest = manifest_digest(manifest)
    if manifest.get("digest") != digest:
        raise corrupt(path, f"digest {manifest.get('digest')}", digest)
    return manifest


def _check_size(path: pathlib.Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise CorruptTokenStoreError(path, f"{expected} bytes", "no file") from None
    if size != expected:
        raise CorruptTokenStoreError(path, f"{expected} bytes", f"{size} bytes")


def _map(path: pathlib.Path, dtype: np.dtype) -> np.ndarray:
    # An empty file cannot be mapped.
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r")
