"""A corpus in several token stores, as many hosts write it, read as one."""

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
    """One corpus in several token stores. `packed_rows` and `make_dataset` take it in place of a store.

    The rows of all shards are shuffled together, and an epoch holds each of them once. In a mixture, by contrast, each store is a
    component with a share of its own, and the epoch ends with the component that ends first.

    Attributes:
        shards: The stores, in an order that belongs to the corpus: other shards or another order make other rows.

    Args:
        shards: The stores, at least one, all of one tokenizer.

    Raises:
        ValueError: There is no shard, or the shards are of different tokenizers.
    """

    def __init__(self, shards: Sequence[TokenStore]):
        if not shards:
            raise ValueError("shards=[]: give at least one token store.")
        self.shards = tuple(shards)
        first = self.shards[0]
        for shard in self.shards[1:]:
            if _vocabulary(shard) != _vocabulary(first):
                raise ValueError(
                    f"{str(shard.folder)!r} was encoded with another tokenizer than {str(first.folder)!r}: "
                    "write all shards of a corpus with one."
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
        """Opens the shards whose folders match a pattern, in the order of their names.

        Args:
            pattern: Such as ``corpus/shard_*``, as `glob.glob` takes it.
            verify: As in `TokenStore.open`. Of several processes, each verifies so only its part of the shards, and of the others
                the sizes. Together they read the corpus once; one that finds damage ends with an error, and the run with it.
            process_index: Which process this is.
            process_count: How many there are.

        Raises:
            FileNotFoundError: No folder matches.
            CorruptTokenStoreError: A shard is damaged.
            ValueError: The shards are of different tokenizers, or the process does not exist.
        """
        if not 0 <= process_index < process_count:
            raise ValueError(
                f"process_index={process_index}: it must be from 0 to process_count-1={process_count - 1}."
            )
        folders = sorted(name for name in glob.glob(os.fspath(pattern)) if os.path.isdir(name))
        if not folders:
            raise FileNotFoundError(
                f"no folder matches {os.fspath(pattern)!r}; write_store makes one for each shard."
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
        """The folder that holds all shards."""
        return pathlib.Path(os.path.commonpath([shard.folder for shard in self.shards]))

    @property
    def manifest(self) -> dict[str, Any]:
        """What identifies the corpus: the tokenizer's digest, and one over the digests of the shards in their order."""
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
        """Every id is below this."""
        return self.shards[0].vocab_size

    @property
    def eos_id(self) -> int | None:
        """The token at the end of each document, if there is one."""
        return self.shards[0].eos_id

    def __repr__(self) -> str:
        return f"TokenShards({str(self.folder)!r}, {len(self.shards)} shards, num_tokens={self.num_tokens})"


class PackedShards:
    """The rows of all shards, one shard after the other: a random-access data source for grain.

    No row spans two shards, so with ``drop_remainder`` each shard leaves out up to a row at its end.

    Args:
        shards: The corpus.
        length: Tokens in a row.
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
            raise IndexError(f"row {row} of {len(self)}")
        part = bisect.bisect_right(self._ends, row)
        return self.parts[part][row - (self._ends[part - 1] if part else 0)]

    def __repr__(self) -> str:
        return f"PackedShards({self.parts!r})"


def pack(
    store: TokenStore | TokenShards, length: int, **options: Any
) -> PackedTokens | PackedShards:
    """The rows of a store or of shards; options as in `PackedTokens`."""
    if isinstance(store, TokenShards):
        return PackedShards(store, length, **options)
    return PackedTokens(store, length, **options)


def _vocabulary(store: TokenStore) -> tuple[Any, ...]:
    return store.manifest["tokenizer"], store.vocab_size, store.eos_id
