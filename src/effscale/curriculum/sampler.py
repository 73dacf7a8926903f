"""Rows in the order of a curriculum: easy ones first, then a growing pool."""

import sys
from collections.abc import Mapping
from typing import Any

import grain

from effscale.curriculum.order import GrowingOrder
from effscale.curriculum.pools import Difficulty, growing_order
from effscale.data.seeds import check_seed

__all__ = ["CurriculumRows", "Difficulty", "curriculum_rows"]


def curriculum_rows(
    rows: Any,
    difficulties: Mapping[str, Difficulty] | Difficulty,
    *,
    batch_size: int,
    seed: int = 1234,
    num_steps: int | None = None,
    tokens_per_row: int | None = None,
) -> grain.MapDataset:
    """Return rows in the order of a curriculum.

    At each step the samples that every difficulty allows are available, and all of them are equally likely. The samples
    that became available at the same step form a cluster. They are drawn without replacement, in a new random order for
    each pass, and any range of rows contains the clusters in proportion to their sizes, up to a few rows. If
    fewer samples are available than a batch has rows, a batch contains several passes: batches keep their size, while
    DeepSpeed's shrink.

    The row at a position is a pure function of the seed and the position. So there is no state, nothing is written,
    processes do not communicate, a run resumes at any step immediately (`get_state` of the iterator is a number), and
    reading ahead is safe. Element ``i`` belongs to global batch ``i // batch_size``.

    The result is a `grain.MapDataset` that composes like any other: with ``map``, `effscale.data.batch_rows`, or ``mix`` (where
    ``batch_size`` is the number of rows that a batch takes from this component). Worker processes share the table of samples,
    which is a temporary file if it is large. To augment each visit of a sample differently, apply ``random_map`` to the result,
    not to ``rows``.

    Args:
        rows: The samples by id: a dataset with a length, such as `effscale.data.PackedTokens` or a `grain.MapDataset`
            that neither shuffles nor repeats.
        difficulties: The difficulties by name, or a single one.
        batch_size: The number of rows in a global batch.
        seed: The seed of the order.
        num_steps: The total number of batches; None means endless.
        tokens_per_row: The number of tokens that a row counts for, if a pacing uses tokens as its clock. If the length of rows
            changes during training, use another clock.

    Returns:
        The rows, ``num_steps * batch_size`` in number.

    Raises:
        ValueError: The length of a ranking differs from the number of rows, no sample is available at the first step, or
            an argument is out of range.

    Warns:
        UserWarning: Some samples are harder than the maximum difficulty and are never drawn.

    References:
        Li et al., "DeepSpeed Data Efficiency" (2022), section 3.1. https://arxiv.org/abs/2212.03597

    >>> import numpy as np
    >>> from effscale.curriculum.ranking import rank
    >>> from effscale.training import LinearPacing
    >>> words = ["abundance", "a", "air", "alphabet", "able", "ad"]
    >>> length = Difficulty(
    ...     ranking=rank(np.array([len(word) for word in words])),
    ...     pacing=LinearPacing(min_difficulty=2, max_difficulty=9, total=4),
    ... )
    >>> rows = curriculum_rows(words, length, batch_size=2, num_steps=6)
    >>> [rows[i] for i in range(len(rows))]
    ['a', 'ad', 'air', 'air', 'able', 'ad', 'alphabet', 'a', 'air', 'able', 'abundance', 'ad']
    """
    if not isinstance(difficulties, Mapping):
        difficulties = {"difficulty": difficulties}
    for name, value in {
        "batch_size": batch_size,
        "num_steps": 1 if num_steps is None else num_steps,
        "tokens_per_row": 1 if tokens_per_row is None else tokens_per_row,
    }.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_seed(seed)
    if not difficulties:
        raise ValueError("difficulties must have at least one entry, got {}")
    if not 0 < len(rows) < sys.maxsize:
        raise ValueError(
            f"rows must have a finite length of at least 1, got {len(rows)}. "
            "Do not call repeat; the curriculum repeats the rows."
        )
    order = growing_order(difficulties, len(rows), batch_size, seed, tokens_per_row)
    length = sys.maxsize if num_steps is None else num_steps * batch_size
    return grain.MapDataset.source(CurriculumRows(rows, order, batch_size, length))


class CurriculumRows:
    """A random-access data source: rows in a given order."""

    def __init__(self, rows: Any, order: GrowingOrder, batch_size: int, length: int):
        self._rows, self._order, self._batch_size, self._length = rows, order, batch_size, length
        self._batches: dict[int, Any] = {}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self._length:
            raise IndexError(f"row must be from 0 to {self._length - 1}, got {index}")
        batch, place = divmod(int(index), self._batch_size)
        samples = self._batches.get(batch)
        if samples is None:
            # Compute the order of a whole batch, which costs little more than one element. Threads that do so at the
            # same time get the same result and need no lock.
            if len(self._batches) >= 64:
                self._batches.clear()
            samples = self._order(batch * self._batch_size, self._batch_size)
            self._batches[batch] = samples
        return self._rows[int(samples[place])]
