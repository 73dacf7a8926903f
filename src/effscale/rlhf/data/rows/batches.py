"""Batches of rows, in a different order in every epoch."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped

from effscale.rlhf.data.phases import Blend

Rows = Mapping[str, Shaped[np.ndarray, "_ ..."]]


def row_batches(
    rows: Rows | Mapping[int, Rows], batch_size: int, *, epoch: int, seed: int = 0
) -> Iterator[dict[str, Shaped[np.ndarray, "_ ..."]]]:
    """Yield the batches of one epoch, each with rows of one length.

    The order is a function of seed and epoch. Rows that do not fill a batch are left out; these differ between
    epochs.

    Args:
        rows: Arrays by name whose first axis is the rows; or such arrays by length, as returned by ``pair_rows`` and
            ``prompt_rows``, whose batches are yielded in random order.
        batch_size: Number of rows in a batch.
        epoch: Epoch, counted from 0.
        seed: Seed of the order.

    Raises:
        ValueError: No length has enough rows for a batch.

    Example:
        >>> batches = row_batches({"input_ids": np.arange(10)[:, None]}, 4, epoch=0)
        >>> [batch["input_ids"].shape for batch in batches]
        [(4, 1), (4, 1)]
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    by_length = all(isinstance(key, int) for key in rows)
    groups: list[Any] = list(rows.values()) if by_length else [rows]
    sizes = [len(next(iter(group.values()))) for group in groups]
    kept = [(g, size) for g, size in zip(groups, sizes, strict=True) if size >= batch_size]
    if not kept:
        raise ValueError(
            f"batch_size must be at most the number of rows of some length, {sizes}, got {batch_size}"
        )
    order = Blend(sizes=tuple(size for _, size in kept), seed=seed).epoch(epoch)
    batches = []
    for number, (group, size) in enumerate(kept):
        chosen = order[order[:, 0] == number, 1]
        for start in range(0, size - batch_size + 1, batch_size):
            batches.append((group, chosen[start : start + batch_size]))
    generator = np.random.default_rng(np.random.SeedSequence([seed, 2, epoch]))
    for place in generator.permutation(len(batches)):
        group, chosen = batches[place]
        yield {name: array[chosen] for name, array in group.items()}
