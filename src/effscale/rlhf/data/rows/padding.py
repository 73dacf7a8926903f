"""Pad rows of different lengths into one array, and choose among a few array lengths."""

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
    rows: Sequence[Sequence[int]], length: int, pad_token_id: int, *, side: Literal["left", "right"]
) -> tuple[Int[np.ndarray, "rows length"], Bool[np.ndarray, "rows length"]]:
    """Pad rows of token ids to one length.

    Args:
        rows: The ids of each row.
        length: The length to pad to.
        pad_token_id: The padding token.
        side: The side to pad on.

    Returns:
        The ids, int32, and a mask that is true at the given ids, whatever their value.

    Raises:
        ValueError: A row is longer than ``length``.

    Example:
        >>> tokens, mask = pad_rows([[5, 6, 7], [8, 9]], 6, pad_token_id=0, side="left")
        >>> tokens.tolist()
        [[0, 0, 0, 5, 6, 7], [0, 0, 0, 0, 8, 9]]
    """
    if side not in ("left", "right"):
        raise ValueError(f'side must be "left" or "right", got {side!r}')
    tokens = np.full((len(rows), length), pad_token_id, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        if len(row) > length:
            raise ValueError(
                f"length must be at least the {len(row)} tokens of row {i}, got {length}"
            )
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        tokens[i, place] = row
        mask[i, place] = True
    return tokens, mask


def check_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """Return the lengths sorted, without duplicates.

    Raises:
        ValueError: There are no lengths, or one is below 1.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(
            f"lengths must be one or a few numbers of at least 1, got {tuple(lengths)}"
        )
    return tuple(sorted(set(lengths)))


def bucket_of(size: int, lengths: tuple[int, ...]) -> int | None:
    """Return the shortest length that fits, or None."""
    place = bisect.bisect_left(lengths, size)
    return lengths[place] if place < len(lengths) else None


def check_too_long(too_long: str) -> None:
    """Raise for an invalid choice."""
    if too_long not in ("drop", "cut"):
        raise ValueError(f'too_long must be "drop" or "cut", got {too_long!r}')


class Account:
    """Counts the records that do not become rows, and logs the counts once."""

    def __init__(self, records: Sequence[Any], report: RecordReport | None):
        self.records, self.report, self.skipped = records, report, RecordReport()

    def drop(self, reason: Reason, index: int, detail: str) -> None:
        """Count one record."""
        self.skipped.add(reason, f"record {index}", detail)

    def close(self) -> None:
        """Log the counts and add them to the report.

        Raises:
            ValueError: No row is left.
        """
        if self.skipped.total:
            logger.warning("of %d records: %s", len(self.records), self.skipped)
        if self.report is not None:
            self.report.merge(self.skipped)
        if self.skipped.total >= len(self.records):
            raise ValueError(f"no row is left of {len(self.records)} records: {self.skipped}")
