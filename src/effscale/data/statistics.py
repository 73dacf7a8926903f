"""Counts over a token store."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from effscale.data.store import TokenStore


def token_counts(store: TokenStore | Sequence[TokenStore]) -> Int64[np.ndarray, " vocab"]:
    """Count how often each token occurs. The store is read in chunks, so memory use does not depend on its size."""
    stores = [store] if isinstance(store, TokenStore) else list(store)
    size = max(one.vocab_size for one in stores)
    counts = np.zeros(size, np.int64)
    for one in stores:
        for chunk in one.chunks():
            counts += np.bincount(chunk, minlength=size)
    return counts


def unigram_entropy(store: TokenStore | Sequence[TokenStore]) -> float:
    r"""Return the entropy of the tokens' frequencies, in nats per token.

    $$H = -\sum_v p_v \ln p_v$$

    No model that ignores the context has a lower loss on these tokens. So a language model has
    learned something from the context only if its loss is below this.

    Raises:
        ValueError: The store is empty.
    """
    counts = token_counts(store)
    counts = counts[counts > 0]
    if not counts.size:
        raise ValueError(f"{store!r} has no tokens, so its entropy is undefined")
    total = counts.sum()
    return float(np.log(total) - (counts * np.log(counts)).sum() / total)
