"""Writing token stores: streaming, atomic and with digests."""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer

from effscale.atomic import atomic_folder
from effscale.data.store import (
    FORMAT,
    MANIFEST,
    OFFSET_DTYPE,
    OFFSETS,
    TOKENS,
    VERSION,
    manifest_digest,
)
from effscale.paths import local_path


class TokenStoreWriter:
    """A context manager that writes a token store while ids arrive.

    Nothing is kept in memory. The folder appears when the block ends without an exception; after an
    exception no folder is left.

    >>> import tempfile
    >>> from effscale.data import TokenStore
    >>> folder = tempfile.mkdtemp() + "/store"
    >>> with TokenStoreWriter(folder, vocab_size=10, eos_token_id=0) as writer:
    ...     writer.add_document([1, 2, 3])
    ...     writer.add_document([4])
    >>> store = TokenStore.open(folder)
    >>> store.tokens.tolist(), store.offsets.tolist()
    ([1, 2, 3, 0, 4, 0], [0, 4, 6])
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        vocab_size: int,
        eos_token_id: int | None = None,
        tokenizer_digest: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ):
        """Create the writer.

        Args:
            folder: The store's folder, which must not exist yet.
            vocab_size: The size of the vocabulary. It also selects uint16 or uint32 as the type of the ids.
            eos_token_id: A token to append to each document.
            tokenizer_digest: The result of `tokenizer_digest`, to distinguish stores with different tokenizers.
            metadata: Plain values to store in the manifest, such as the source.
            overwrite: Whether to replace an existing folder once the new one is complete.

        Raises:
            ValueError: ``vocab_size`` or ``eos_token_id`` is out of range.
        """
        if not 1 <= vocab_size <= 2**32:
            raise ValueError(f"vocab_size must be from 1 to 2**32, got {vocab_size}")
        if eos_token_id is not None and not 0 <= eos_token_id < vocab_size:
            raise ValueError(
                f"eos_token_id must be from 0 to vocab_size-1={vocab_size - 1}, got {eos_token_id}"
            )
        self.folder = local_path(folder)
        self.vocab_size, self.eos_token_id = vocab_size, eos_token_id
        self.num_tokens = self.num_documents = self.empty_documents = 0
        self.metadata = dict(metadata or {})
        self._tokenizer_digest, self._overwrite = tokenizer_digest, overwrite
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self._start = 0

    def __enter__(self) -> "TokenStoreWriter":
        with contextlib.ExitStack() as stack:
            self._temporary = stack.enter_context(
                atomic_folder(self.folder, overwrite=self._overwrite)
            )
            self._tokens = stack.enter_context(_DigestingFile(self._temporary / TOKENS))
            self._offsets = stack.enter_context(_DigestingFile(self._temporary / OFFSETS))
            self._offsets.write(np.zeros(1, OFFSET_DTYPE))
            self._stack = stack.pop_all()
        return self

    def write(self, ids: Sequence[int] | Integer[np.ndarray, " length"]) -> None:
        """Append ids to the current document.

        Raises:
            ValueError: An id is negative or not below ``vocab_size``.
        """
        array = np.asarray(ids, np.int64)
        if array.size and (array.min() < 0 or array.max() >= self.vocab_size):
            raise ValueError(
                f"token ids must be from 0 to vocab_size-1={self.vocab_size - 1}, got ids from {array.min()} to "
                f"{array.max()}. Set vocab_size to that of the tokenizer that made them."
            )
        self._tokens.write(array.astype(self._dtype))
        self.num_tokens += array.size

    def end_document(self) -> None:
        """End the current document; one without tokens is counted but not stored."""
        if self.num_tokens == self._start:
            self.empty_documents += 1
            return
        if self.eos_token_id is not None:
            self.write([self.eos_token_id])
        self._offsets.write(np.array([self.num_tokens], OFFSET_DTYPE))
        self.num_documents += 1
        self._start = self.num_tokens

    def add_document(self, ids: Sequence[int] | Integer[np.ndarray, " length"]) -> None:
        """Append a whole document."""
        self.write(ids)
        self.end_document()

    def __exit__(self, kind, error, traceback):
        if kind is not None:
            # The stack passes the exception on, so the context of the folder discards the partial files.
            return self._stack.__exit__(kind, error, traceback)
        with self._stack:
            if self.num_tokens != self._start:
                self.end_document()
            self._tokens.close()
            self._offsets.close()
            self._write_manifest()
        return None

    def _write_manifest(self) -> None:
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": self._dtype.str,
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "empty_documents": self.empty_documents,
            "vocab_size": self.vocab_size,
            "eos_id": self.eos_token_id,
            "tokenizer": self._tokenizer_digest,
            "metadata": self.metadata,
            "files": {TOKENS: self._tokens.summary(), OFFSETS: self._offsets.summary()},
        }
        manifest["digest"] = manifest_digest(manifest)
        text = json.dumps(manifest, indent=2, sort_keys=True)
        (self._temporary / MANIFEST).write_text(text + "\n", encoding="utf-8")


class _DigestingFile:
    """A file whose digest is computed while it is written."""

    def __init__(self, path: pathlib.Path):
        self._stream = open(path, "wb", buffering=1 << 20)  # noqa: SIM115
        self._digest = hashlib.blake2b(digest_size=16)
        self._bytes = 0

    def write(self, array: np.ndarray) -> None:
        data = array.tobytes()
        self._stream.write(data)
        self._digest.update(data)
        self._bytes += len(data)

    def summary(self) -> dict[str, Any]:
        return {"bytes": self._bytes, "blake2b": self._digest.hexdigest()}

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> "_DigestingFile":
        return self

    def __exit__(self, kind, error, traceback):
        if kind is None:
            self._stream.close()
            return
        # Flushing to a full disk fails again; report only the first failure.
        with contextlib.suppress(OSError):
            self._stream.close()
