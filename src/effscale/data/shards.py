"""A corpus in several token stores, for instance written by many hosts, read as one."""

import bisect
import glob
import hashlib
import itertools
import operator
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from effscale.data.packing import PackedTokens, Row
from effscale.data.store import TokenStore, Verify


class TokenShards:
    """A corpus in several token stores. `packed_rows` and `make_dataset` accept it in place of a store.

    The rows of all shards are shuffled together, and an epoch contains each of them once. In a mixture, by contrast, each
    store is a component with a separate share, and the epoch ends when the first component ends.

    Attributes:
        shards: The stores. Their order is part of the corpus: with a different order or other shards, the rows differ.

    Args:
        shards: The stores, at least one, all encoded with the same tokenizer.

    Raises:
        ValueError: ``shards`` is empty, or the shards were encoded with different tokenizers.
    """

    def __init__(self, shards: Sequence[TokenStore]):
        if not shards:
            raise ValueError("shards must have at least one token store, got []")
        self.shards = tuple(shards)
        first = self.shards[0]
        for shard in self.shards[1:]:
            if _vocabulary(shard) != _vocabulary(first):
                raise ValueError(
                    f"{shard.folder}: encoded with a different tokenizer than {first.folder}. "
                    "Write all shards of a corpus with the same tokenizer."
                )

    @classmethod
    def open(
        cls,
        pattern: str | os.PathLike[str],
        *,
        verify: Verify = "once",
        process_index: int = 0,
        process_count: int = 1,
    ) -> "TokenShards":
        """Open the shards whose folders match a pattern, in the order of their names.

        Args:
            pattern: A pattern for `glob.glob`, such as ``corpus/shard_*``.
            verify: As in `TokenStore.open`. With several processes, each verifies the contents of its part of the shards and
                only the sizes of the others, so that together they read the corpus once. A process that finds damage raises an
                error, which ends the run.
            process_index: The index of this process.
            process_count: The number of processes.

        Raises:
            FileNotFoundError: No folder matches.
            CorruptTokenStoreError: A shard is damaged.
            ValueError: The shards were encoded with different tokenizers, or ``process_index`` is out of range.
        """
        if not 0 <= process_index < process_count:
            raise ValueError(
                f"process_index must be from 0 to process_count-1={process_count - 1}, got {process_index}"
            )
        folders = sorted(name for name in glob.glob(os.fspath(pattern)) if os.path.isdir(name))
        if not folders:
            raise FileNotFoundError(
                f"no folder matches {os.fspath(pattern)!r}. Create one for each shard with write_store."
            )
        return cls(
            [
                TokenStore.open(
                    folder, verify=verify if index % process_count == process_index else "size"
                )
                for index, folder in enumerate(folders)
            ]
        )

    @property
    def folder(self) -> pathlib.Path:
        """The folder that contains all shards."""
        return pathlib.Path(os.path.commonpath([shard.folder for shard in self.shards]))

    @property
    def manifest(self) -> dict[str, Any]:
        """The identity of the corpus: the digest of the tokenizer, and a digest over those of the shards in order."""
        digests = "".join(shard.manifest["digest"] for shard in self.shards)
        return {
            "tokenizer": self.shards[0].manifest["tokenizer"],
            "digest": hashlib.blake2b(digests.encode(), digest_size=16).hexdigest(),
        }

    @property
    def num_tokens(self) -> int:
        """The number of tokens in all shards."""
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_documents(self) -> int:
        """The number of documents in all shards."""
        return sum(shard.num_documents for shard in self.shards)

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary; every id is smaller."""
        return self.shards[0].vocab_size

    @property
    def eos_token_id(self) -> int | None:
        """The token at the end of each document, if there is one."""
        return self.shards[0].eos_token_id

    def __repr__(self) -> str:
        return f"TokenShards({str(self.folder)!r}, {len(self.shards)} shards, num_tokens={self.num_tokens})"


class PackedShards:
    """The rows of all shards, one shard after another, as a random-access data source for grain.

    No row spans two shards, so with ``drop_remainder`` up to one row is dropped at the end of each shard.

    Args:
        shards: The corpus.
        length: The number of tokens in a row.
        options: As in `PackedTokens`.
    """

    def __init__(self, shards: TokenShards, length: int, **options: Any):
        self.parts = [PackedTokens(shard, length, **options) for shard in shards.shards]
        self._ends = list(itertools.accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Row:
        row = operator.index(index)
        if not 0 <= row < len(self):
            raise IndexError(f"row must be from 0 to {len(self) - 1}, got {row}")
        part = bisect.bisect_right(self._ends, row)
        return self.parts[part][row - (self._ends[part - 1] if part else 0)]

    def __repr__(self) -> str:
        return f"PackedShards({self.parts!r})"


def pack(
    store: TokenStore | TokenShards, length: int, **options: Any
) -> PackedTokens | PackedShards:
    """Return the rows of a store or of a sharded corpus, with the options of `PackedTokens`."""
    if isinstance(store, TokenShards):
        return PackedShards(store, length, **options)
    return PackedTokens(store, length, **options)


def _vocabulary(store: TokenStore) -> tuple[Any, ...]:
    return store.manifest["tokenizer"], store.vocab_size, store.eos_token_id
