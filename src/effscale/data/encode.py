"""Encode text as token ids, in batches of bounded size."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import tokenizers

from effscale.data.documents import Document
from effscale.data.tokenizer import split_text

# Encoding takes more than a hundred bytes of working memory per character.
BATCH_CHARACTERS = 1 << 20


class EncodedPiece(NamedTuple):
    """The ids of a document, or of the next part of a long one."""

    document: Document
    characters: int
    ids: list[int]
    last: bool


def encode_documents(
    documents: Iterable[Document],
    tokenizer: tokenizers.Tokenizer,
    *,
    parse_special_tokens: bool = False,
    batch_characters: int = BATCH_CHARACTERS,
) -> Iterator[list[EncodedPiece]]:
    """Encode documents in order, several at a time on all cores.

    A document may come as several pieces, in order, the last of them marked. Truncation and padding
    settings saved with the tokenizer are ignored, and it adds no special tokens.

    Args:
        documents: The documents.
        tokenizer: The tokenizer, which is not modified.
        parse_special_tokens: Whether the name of a special token in a text is encoded as that token.
            By default it is encoded as ordinary text, so that a document cannot forge a separator.
        batch_characters: The number of characters to encode at a time.
    """
    encoder = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = not parse_special_tokens
    pending: list[tuple[Document, str, bool]] = []
    size = 0

    def flush() -> list[EncodedPiece]:
        encoded = encoder.encode_batch_fast(
            [text for _, text, _ in pending], add_special_tokens=False
        )
        return [
            EncodedPiece(document, len(text), encoding.ids, last)
            for (document, text, last), encoding in zip(pending, encoded, strict=True)
        ]

    for document in documents:
        pieces = split_text(document.text) or [""]
        for number, piece in enumerate(pieces, start=1):
            pending.append((document, piece, number == len(pieces)))
            size += len(piece)
            if size >= batch_characters:
                yield flush()
                pending, size = [], 0
    if pending:
        yield flush()
