"""A bounded sample of a corpus, to train a tokenizer on."""

import heapq
from collections.abc import Iterable

from effscale.data.documents import Document
from effscale.data.splits import text_hash


def sample_texts(
    documents: Iterable[Document], *, max_characters: int = 32 << 20, seed: int = 0
) -> list[str]:
    """Draws whole documents at random until about ``max_characters`` are held.

    The documents with the smallest hashes are kept: a uniform sample of the distinct texts that
    does not depend on their order. A corpus below the limit is kept whole. The corpus is read once
    and only the sample is held in memory.

    Args:
        documents: The corpus.
        max_characters: The size of the sample; a first document larger than that is cut.
        seed: Another seed draws another sample.

    Raises:
        ValueError: ``max_characters`` is below 1.
    """
    if max_characters < 1:
        raise ValueError(f"max_characters={max_characters}: it must be at least 1.")
    kept: list[tuple[float, str]] = []
    total = 0
    for document in documents:
        place = text_hash(document.text, seed=seed, purpose=b"sample")
        # Negative, so that the heap's top is the largest hash, the first to go.
        heapq.heappush(kept, (-place, document.text))
        total += len(document.text)
        while total > max_characters and len(kept) > 1:
            total -= len(heapq.heappop(kept)[1])
    return [text[:max_characters] for _, text in sorted(kept, reverse=True)]
