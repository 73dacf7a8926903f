"""A bounded random sample of a corpus, for training a tokenizer."""

import heapq
from collections.abc import Iterable

from effscale.data.documents import Document
from effscale.data.splits import text_hash


def sample_texts(
    documents: Iterable[Document], *, max_characters: int = 32 << 20, seed: int = 0
) -> list[str]:
    """Draw a random sample of whole documents, about ``max_characters`` in total.

    The documents with the smallest hashes are kept. This gives a uniform sample of the distinct texts that
    does not depend on their order. A corpus below the limit is kept whole. The corpus is read once,
    and only the sample is kept in memory.

    Args:
        documents: The corpus.
        max_characters: The size of the sample; if the first document is longer, it is cut.
        seed: The seed of the sample.

    Raises:
        ValueError: ``max_characters`` is below 1.
    """
    if max_characters < 1:
        raise ValueError(f"max_characters must be at least 1, got {max_characters}")
    kept: list[tuple[float, str]] = []
    total = 0
    for document in documents:
        place = text_hash(document.text, seed=seed, purpose=b"sample")
        # Negative, so that the top of the heap is the largest hash, which is dropped first.
        heapq.heappush(kept, (-place, document.text))
        total += len(document.text)
        while total > max_characters and len(kept) > 1:
            total -= len(heapq.heappop(kept)[1])
    return [text[:max_characters] for _, text in sorted(kept, reverse=True)]
