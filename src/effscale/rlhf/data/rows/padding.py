"""Rows of different lengths in one array, and the few lengths that such arrays have."""

import bisect
import logging
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int

from effscale.rlhf.data.record import Reason, RecordReport

logger = logging.getLogger(__name__)

TooLong = Literal["drop", "cut"]


def pad_rows(
    rows: Sequence[Sequence[int]], length: int, pad_id: int, *, side: Literal["left", "right"]
) -> tuple[Int[np.ndarray, "rows length"], Bool[np.ndarray, "rows length"]]:
    """Fills rows of token ids up to one length.

    Args:
        rows: The ids of each row.
        length: The length.
        pad_id: The token to fill up with.
        side: Where.

    Returns:
        The ids, int32, and a mask that is true at the ids that were given, whatever they are.

    Raises:
        ValueError: A row is longer.

    Example:
        >>> tokens, mask = pad_rows([[5, 6, 7], [8, 9]], 6, pad_id=0, side="left")
        >>> tokens.tolist()
        [[0, 0, 0, 5, 6, 7], [0, 0, 0, 0, 8, 9]]
    """
    if side not in ("left", "right"):
        raise ValueError(f'side={side!r}: must be "left" or "right"')
    tokens = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        if len(row) > length:
            raise ValueError(f"row {i} has {len(row)} tokens, and length={length}")
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        tokens[i, place] = row
        mask[i, place] = True
    return tokens, mask


def check_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """The lengths in order, each once.

    Raises:
        ValueError: There is none, or one is below 1.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"lengths={tuple(lengths)}: give one or a few, each at least 1")
    return tuple(sorted(set(lengths)))


def bucket_of(size: int, lengths: tuple[int, ...]) -> int | None:
    """The shortest of the lengths that is enough, or None."""
    place = bisect.bisect_left(lengths, size)
    return lengths[place] if place < len(lengths) else None


def check_too_long(too_long: str) -> None:
    """Refuses what is no choice."""
    if too_long not in ("drop", "cut"):
        raise ValueError(f'too_long={too_long!r}: must be "drop" or "cut"')


class Account:
    """Counts the records that do not become rows, and tells of them once."""

    def __init__(self, records: Sequence[Any], report: RecordReport | None):
        self.records, self.report, self.skipped = records, report, RecordReport()

    def drop(self, reason: Reason, index: int, detail: str) -> None:
        """Counts one record."""
        self.skipped.add(reason, f"record {index}", detail)

    def close(self) -> None:
        """Logs the count and hands it on.

        Raises:
            ValueError: Nothing is left.
        """
        if self.skipped.total:
            logger.warning("of %d records: %s", len(self.records), self.skipped)
        if self.report is not None:
            self.report.merge(self.skipped)
        if self.skipped.total >= len(self.records):
            raise ValueError(f"no row is left of {len(self.records)} records: {self.skipped}")
