"""Token stores from documents, in one pass."""

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import tokenizers

from effscale.data.documents import Document
from effscale.data.encode import encode_documents
from effscale.data.splits import Splits
from effscale.data.store import TokenStore
from effscale.data.tokenizer import separator_id, tokenizer_digest
from effscale.data.writer import TokenStoreWriter


class Progress(NamedTuple):
    """Progress of writing token stores."""

    documents: int
    characters: int
    tokens: int


def write_splits(
    documents: Iterable[Document],
    folders: Mapping[str, str | os.PathLike[str]],
    tokenizer: tokenizers.Tokenizer,
    *,
    splits: Splits,
    eos_token: str | None = None,
    parse_special_tokens: bool = False,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], object] | None = None,
) -> dict[str, TokenStore]:
    """Encode documents and write each split of the corpus as a token store.

    Memory use does not grow with the size of the corpus.

    Args:
        documents: The documents, read once.
        folders: The output folder of each split.
        tokenizer: The tokenizer.
        splits: Which documents go to which split.
        eos_token: The token to append to each document; None uses the tokenizer's end-of-document token.
        parse_special_tokens: As in `encode_documents`.
        metadata: Plain values to store in the manifests.
        overwrite: Whether to replace existing stores.
        progress: Called after each batch of documents.

    Returns:
        The stores, opened.

    Raises:
        ValueError: ``folders`` does not match ``splits``, or the tokenizer has no such end-of-document token.
        FileExistsError: A folder exists and ``overwrite`` is false.
        DiskFullError: The disk is full; no partial store is left behind.
    """
    if set(folders) != set(splits.fractions):
        raise ValueError(
            f"folders must have one entry for each split, got {sorted(folders)} for the splits "
            f"{sorted(splits.fractions)}"
        )
    eos_token_id = separator_id(tokenizer, eos_token)
    digest = tokenizer_digest(tokenizer)
    done = Progress(0, 0, 0)
    with contextlib.ExitStack() as stack:
        writers = {
            name: stack.enter_context(
                TokenStoreWriter(
                    folder,
                    vocab_size=tokenizer.get_vocab_size(),
                    eos_token_id=eos_token_id,
                    tokenizer_digest=digest,
                    metadata={**(metadata or {}), "split": name, "split_seed": splits.seed},
                    overwrite=overwrite,
                )
            )
            for name, folder in folders.items()
        }
        writer = None
        for batch in encode_documents(
            documents, tokenizer, parse_special_tokens=parse_special_tokens
        ):
            for piece in batch:
                if writer is None:
                    writer = writers[splits.assign(piece.document.text)]
                writer.write(piece.ids)
                if piece.last:
                    writer.end_document()
                    writer = None
            done = Progress(
                done.documents + sum(piece.last for piece in batch),
                done.characters + sum(piece.characters for piece in batch),
                sum(writer.num_tokens for writer in writers.values()),
            )
            if progress is not None:
                progress(done)
    # The files just written are still in the page cache, so reading them back would not check the disk.
    return {name: TokenStore.open(folder, verify="size") for name, folder in folders.items()}


def write_store(
    documents: Iterable[Document],
    folder: str | os.PathLike[str],
    tokenizer: tokenizers.Tokenizer,
    *,
    eos_token: str | None = None,
    parse_special_tokens: bool = False,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], object] | None = None,
) -> TokenStore:
    """Encode documents and write them as one token store. Arguments as in `write_splits`."""
    stores = write_splits(
        documents,
        {"all": folder},
        tokenizer,
        splits=Splits(fractions={"all": 1.0}),
        eos_token=eos_token,
        parse_special_tokens=parse_special_tokens,
        metadata=metadata,
        overwrite=overwrite,
        progress=progress,
    )
    return stores["all"]
