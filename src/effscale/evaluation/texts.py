"""Log-probabilities of whole texts, which may be longer than the model can read."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from effscale.evaluation.continuations import score_continuations


def text_log_probs(
    model: Any,
    texts: Sequence[Sequence[int]],
    *,
    bos_token_id: int,
    max_length: int,
    batch_size: int = 8,
) -> Shaped[np.ndarray, "texts"]:
    """Return the log-probabilities of texts in nats; every token is predicted once.

    A text is read in windows of ``max_length`` tokens, as in EleutherAI's evaluation harness. Each window predicts the
    tokens after those of the previous window, the first of them from only one token, and the last window reaches back so
    that it is full. Perplexity is therefore higher than with the full context that fits. ``exp(-sum / tokens)`` is the
    perplexity per token; divide by bytes instead of tokens to compare models with different tokenizers.

    Args:
        model: As in ``score_continuations``.
        texts: Token ids, at least one for each text.
        bos_token_id: The token before the first one.
        max_length: The maximum number of tokens that the model reads.
        batch_size: The number of windows in a batch.

    Raises:
        ValueError: A text is empty, or ``max_length`` is below 1.

    Example:
        >>> from flax import nnx
        >>> from effscale.models import Transformer, gpt2
        >>> tiny = gpt2(num_layers=1, d_model=16, num_heads=2, vocab_size=50, max_length=8)
        >>> text_log_probs(Transformer(tiny, rngs=nnx.Rngs(0)), [list(range(20))], bos_token_id=0, max_length=8).shape
        (1,)
    """
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    contexts, continuations, owners = [], [], []
    for number, text in enumerate(texts):
        if not len(text):
            raise ValueError(f"text {number} is empty")
        ids = [bos_token_id, *text]
        for begin in range(0, len(text), max_length):
            end = min(begin + max_length, len(text))
            # ids[end] is the last token that this window predicts; it reads those before.
            first = max(0, end - max_length)
            contexts.append(ids[first : begin + 1])
            continuations.append(ids[begin + 1 : end + 1])
            owners.append(number)
    options = {"batch_size": batch_size, "max_length": max_length}
    found = score_continuations(model, contexts, continuations, **options)
    total = np.zeros(len(texts))
    np.add.at(total, owners, found.log_probs)
    return total
