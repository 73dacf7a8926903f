"""Packing: documents are joined end to end and cut into rows of one length."""

import operator

import numpy as np
from jaxtyping import Shaped

from effscale.data.store import TokenStore

Row = dict[str, Shaped[np.ndarray, " length"]]


class PackedTokens:
    """The rows of a token store, as a random-access data source for grain.

    The store's tokens are one long sequence ``t``; row ``r`` predicts ``t[rL+1 : rL+L+1]`` from
    ``t[rL : rL+L]``. So every token except the very first is a label exactly once, and a row depends
    only on its index.

    A row is a dict of arrays of ``length``:

    - ``input_ids``, ``labels``: int32.
    - ``loss_weights``: float32; 0 in padding and where the label belongs to a different document than
      its input; 1 elsewhere.
    - ``segment_ids``: int32; 1, 2, ... for the documents of the row, 0 for padding.
    - ``positions``: int32; counted from 0 at the start of each document and of the row.
    """

    def __init__(
        self,
        store: TokenStore,
        length: int,
        *,
        cross_document: bool = False,
        drop_remainder: bool = True,
        pad_token_id: int = 0,
    ):
        """Create the data source.

        Args:
            store: The token store.
            length: The number of tokens in a row.
            cross_document: Whether to treat the row as one document: a single segment, continuous positions, and
                a loss on every label.
            drop_remainder: Whether to drop the last row if it is not full; otherwise it is padded.
            pad_token_id: The padding token.

        Raises:
            ValueError: ``length`` or ``pad_token_id`` is out of range.
        """
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        if not 0 <= pad_token_id < store.vocab_size:
            raise ValueError(
                f"pad_token_id must be from 0 to {store.vocab_size - 1}, got {pad_token_id}"
            )
        self.store, self.length, self.pad_token_id = store, length, pad_token_id
        self.cross_document, self.drop_remainder = cross_document, drop_remainder
        labels = max(store.num_tokens - 1, 0)
        self._rows = labels // length if drop_remainder else -(-labels // length)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> Row:
        row = operator.index(index)
        if not 0 <= row < self._rows:
            raise IndexError(f"row must be from 0 to {self._rows - 1}, got {row}")
        start = row * self.length
        stop = min(start + self.length, self.store.num_tokens - 1)
        window = self.store.tokens[start : stop + 1].astype(np.int32)
        count = stop - start
        weights = np.ones(count, np.float32)
        starts = np.zeros(1, np.int64)
        if not self.cross_document:
            # The documents whose first token is a label of this row.
            first, last = np.searchsorted(self.store.offsets, (start, stop), side="right")
            bounds = np.asarray(self.store.offsets[first:last]) - start
            weights[bounds - 1] = 0
            starts = np.concatenate([starts, bounds[bounds < count]])
        lengths = np.diff(starts, append=count)
        segments = np.repeat(np.arange(1, len(starts) + 1), lengths)
        positions = np.arange(count) - np.repeat(starts, lengths)
        return {
            "input_ids": self._pad(window[:-1], np.int32, self.pad_token_id),
            "labels": self._pad(window[1:], np.int32, self.pad_token_id),
            "loss_weights": self._pad(weights, np.float32, 0),
            "segment_ids": self._pad(segments, np.int32, 0),
            "positions": self._pad(positions, np.int32, 0),
        }

    def _pad(self, values: np.ndarray, dtype: type, fill: int) -> np.ndarray:
        padded = np.full(self.length, fill, dtype)
        padded[: len(values)] = values
        return padded

    def __repr__(self) -> str:
        return (
            f"PackedTokens({self.store!r}, length={self.length}, "
            f"cross_document={self.cross_document}, drop_remainder={self.drop_remainder})"
        )
