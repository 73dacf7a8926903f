"""Read the rows of any source as batches of arrays."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from effscale.curriculum.metrics import NO_LABEL, Batch
from effscale.data import PackedTokens


def read_rows(source: Any, start: int, stop: int) -> Batch:
    """Read rows ``start`` to ``stop`` of a source as a batch.

    Whole ranges are read at a time if the source is a `PackedTokens` or has a method
    ``rows(start, stop)`` that returns a dict of arrays with one row each; otherwise rows are read one by one.
    Rows of different lengths are padded at the end: ``labels`` with -100, which every loss ignores, and the
    rest with zeros. If they have neither ``attention_mask`` nor ``segment_ids``, the batch gets
    ``segment_ids``: 1, and 0 in the padding. The length of a row is that of ``input_ids``, or else of all
    fields whose lengths differ between rows. If these disagree, no ``segment_ids`` are added.

    Raises:
        ValueError: A row is not a dict, or its fields or shapes do not match those of the first.
    """
    if isinstance(source, PackedTokens):
        return _packed_rows(source, start, stop)
    if hasattr(source, "rows"):
        batch = source.rows(start, stop)
        for key, values in batch.items():
            if values.shape[:1] != (stop - start,):
                raise ValueError(
                    f"rows({start}, {stop}) must return arrays with a first axis of {stop - start}, "
                    f"got {key!r} of shape {values.shape}"
                )
        return batch
    return _stack([source[index] for index in range(start, stop)], start)


def _stack(rows: list[Any], start: int) -> Batch:
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping) or row.keys() != rows[0].keys():
            found = sorted(row) if isinstance(row, Mapping) else type(row).__name__
            raise ValueError(
                f"rows must be dicts with the same fields, got {found} for row {start + number}"
            )
    fields = {key: [np.asarray(row[key]) for row in rows] for key in rows[0]}
    if not {"attention_mask", "segment_ids"} & fields.keys():
        shapes = {key: tuple(x.shape[:1] for x in arrays) for key, arrays in fields.items()}
        lengths = {shape for shape in shapes.values() if len(set(shape)) > 1}
        if "input_ids" in shapes:
            lengths = {shapes["input_ids"]}
        if len(lengths) == 1:
            fields["segment_ids"] = [np.ones(shape, np.int32) for shape in lengths.pop()]
    batch = {}
    for key, arrays in fields.items():
        if len({array.shape for array in arrays}) > 1:
            arrays = _padded(key, arrays, start)
        batch[key] = np.stack(arrays)
    return batch


def _padded(key: str, arrays: list[np.ndarray], start: int) -> list[np.ndarray]:
    for number, array in enumerate(arrays):
        if array.ndim != arrays[0].ndim or array.shape[1:] != arrays[0].shape[1:]:
            raise ValueError(
                f"the shapes of field {key!r} must differ only in the first axis, got {array.shape} for row "
                f"{start + number} and {arrays[0].shape} for row {start}"
            )
    longest = max(len(array) for array in arrays)
    rest = [(0, 0)] * (arrays[0].ndim - 1)
    fill = NO_LABEL if key == "labels" else 0
    return [
        np.pad(array, [(0, longest - len(array)), *rest], constant_values=fill) for array in arrays
    ]


def _packed_rows(packed: PackedTokens, start: int, stop: int) -> Batch:
    """Return the rows ``packed[start] ... packed[stop - 1]`` stacked, with one read of the file."""
    store, length = packed.store, packed.length
    first, last = start * length, min(stop * length, store.num_tokens - 1)
    size = store.tokens.dtype.itemsize
    # A plain read, as pages of the memory map would count as memory of this process.
    window = np.fromfile(
        store.tokens_path, store.tokens.dtype, count=last - first + 1, offset=first * size
    ).astype(np.int32)
    count = last - first
    begins = np.zeros((stop - start, length), bool)
    begins[:, 0] = True
    weights = np.ones(count, np.float32)
    if not packed.cross_document:
        # The documents whose first token is a label of these rows.
        low, high = np.searchsorted(store.offsets, (first, last), side="right")
        bounds = np.asarray(store.offsets[low:high]) - first
        weights[bounds - 1] = 0
        begins.ravel()[bounds[bounds < count]] = True
    segments = np.cumsum(begins, axis=1, dtype=np.int32)
    column = np.arange(length, dtype=np.int32)
    positions = column - np.maximum.accumulate(np.where(begins, column, np.int32(0)), axis=1)
    segments.ravel()[count:] = 0
    positions.ravel()[count:] = 0

    def rows(values: np.ndarray, fill: int) -> np.ndarray:
        missing = (stop - start) * length - count
        return np.pad(values, (0, missing), constant_values=fill).reshape(-1, length)

    return {
        "input_ids": rows(window[:-1], packed.pad_token_id),
        "labels": rows(window[1:], packed.pad_token_id),
        "loss_weights": rows(weights, 0),
        "segment_ids": segments,
        "positions": positions,
    }
