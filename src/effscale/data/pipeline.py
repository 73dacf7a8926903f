"""Batches for training: shuffled, mixed, split over processes, and resumable at any batch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import grain
import numpy as np

from effscale.data.seeds import check_seed
from effscale.data.shards import TokenShards, pack
from effscale.data.store import TokenStore

if TYPE_CHECKING:
    from effscale.training.stages import Stages

MAX_ROWS = 2**32
"""grain shuffles 32-bit indices."""


def packed_rows(
    stores: TokenStore | TokenShards | Sequence[TokenStore | TokenShards],
    *,
    length: int,
    seed: int = 0,
    shuffle: bool = True,
    weights: Sequence[float | int] | None = None,
    num_epochs: int | None = None,
    cross_document: bool = False,
    drop_remainder: bool = True,
) -> grain.MapDataset:
    """Return the rows of one store, of a sharded corpus or of a mixture, in training order.

    The result is a `grain.MapDataset`, so any other grain transformation can be applied to it.

    Args:
        stores: A token store, a sharded corpus, or the components of a mixture.
        length: The number of tokens in a row.
        seed: The seed of the order; each epoch has a different order.
        shuffle: Whether to shuffle the rows of each store.
        weights: The share of rows from each store; by default in proportion to their number of rows.
        num_epochs: The number of passes over the data; None repeats it forever. A mixture ends when the
            first of its components has made that many passes.
        cross_document: As in `PackedTokens`.
        drop_remainder: As in `PackedTokens`.

    Raises:
        ValueError: A store has less than one row, the stores' vocabularies differ, or an argument
            is out of range.
    """
    stores = [stores] if isinstance(stores, (TokenStore, TokenShards)) else list(stores)
    _check_stores(stores)
    if weights is not None and len(weights) != len(stores):
        raise ValueError(
            f"weights must have one entry for each of the {len(stores)} stores, got {len(weights)}"
        )
    if weights is not None and not all(np.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"weights must be finite and above 0, got {list(weights)}")
    if num_epochs is not None and num_epochs < 1:
        raise ValueError(
            f"num_epochs must be at least 1, or None to repeat forever, got {num_epochs}"
        )
    check_seed(seed)
    components, sizes = [], []
    for index, store in enumerate(stores):
        rows = pack(store, length, cross_document=cross_document, drop_remainder=drop_remainder)
        if not len(rows):
            raise ValueError(
                f"{store.folder}: {store.num_tokens} tokens are fewer than one row of "
                f"length={length} and its next token. Use a shorter length or more text."
            )
        dataset = grain.MapDataset.source(rows)
        if shuffle and len(rows) > MAX_ROWS:
            raise ValueError(
                f"{store.folder}: the store has {len(rows)} rows of length={length}, but at most {MAX_ROWS} can be shuffled "
                "together. Use longer rows, or divide the corpus into several components of a mixture."
            )
        if shuffle:
            # grain adds the epoch number to the seed, so the seeds of the components must be far apart.
            words = np.random.SeedSequence([seed, index]).generate_state(1)
            dataset = dataset.shuffle(seed=int(words[0]))
        components.append(dataset.repeat(num_epochs))
        sizes.append(len(rows))
    if len(components) == 1:
        return components[0]
    shares = np.asarray(sizes if weights is None else weights, np.float64)
    return grain.MapDataset.mix(components, weights=list(shares / shares.sum()))


def batch_rows(
    rows: grain.MapDataset,
    *,
    batch_size: "int | Stages[int]",
    process_index: int = 0,
    process_count: int = 1,
    pad_to_batch: bool = False,
    num_threads: int = 2,
    prefetch: int = 8,
) -> grain.IterDataset:
    """Batch rows; each process reads only its own part.

    Global batch ``b`` consists of rows ``b * batch_size`` to ``(b + 1) * batch_size`` for any number of
    processes; process ``p`` gets the ``p``-th of ``process_count`` equal, contiguous parts. This is
    the layout of a batch axis that is sharded over the processes in order: concatenating the parts of
    all processes gives the batch of a single process.

    The iterator's state (``get_state``, ``set_state``) is the number of batches taken, which is the same on all
    processes. So a run can resume on a different number of processes with the same ``batch_size``.

    Args:
        rows: The rows, in order.
        batch_size: The number of rows in a global batch, or the number for each batch, as ``effscale.training.batch_ramp``
            returns it; the rows are then still taken in order, without gaps.
        process_index: The index of this process.
        process_count: The number of processes.
        pad_to_batch: Whether to fill the last batch with rows of zeros (weight 0, segment 0) instead of dropping it.
        num_threads: The number of threads that read ahead; 0 reads in the caller's thread.
        prefetch: The number of batches to read ahead.

    Raises:
        ValueError: ``process_count`` does not divide ``batch_size``, there are fewer rows than one
            batch, or an argument is out of range.
    """
    from effscale.training.stages import Stages

    grows = isinstance(batch_size, Stages)
    for size in batch_size.values if grows else (batch_size,):
        _check_batch(size, process_index, process_count)
    if grows:
        if pad_to_batch:
            raise ValueError("pad_to_batch=True needs a constant batch_size")
        dataset = _growing(rows, batch_size, process_index, process_count)
    else:
        dataset = _even(rows, batch_size, process_index, process_count, pad_to_batch)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return dataset.to_iter_dataset(options)


def _check_batch(batch_size: int, process_index: int, process_count: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index must be from 0 to process_count-1={process_count - 1}, "
            f"got {process_index}"
        )
    if batch_size % process_count:
        raise ValueError(
            f"batch_size must be a multiple of process_count={process_count}, got {batch_size}. "
            f"Use a multiple, such as {-(-batch_size // process_count) * process_count}."
        )


def _too_few(rows: grain.MapDataset, batch_size: int) -> ValueError:
    return ValueError(
        f"the corpus has {len(rows)} rows, fewer than batch_size={batch_size}. "
        "Use a smaller batch, shorter rows or more text."
    )


def _even(
    rows: grain.MapDataset,
    batch_size: int,
    process_index: int,
    process_count: int,
    pad_to_batch: bool,
) -> grain.MapDataset:
    missing = -len(rows) % batch_size
    if pad_to_batch and missing and len(rows):
        first: Any = rows[0]
        padding = grain.MapDataset.source([{key: np.zeros_like(first[key]) for key in first}])
        rows = grain.MapDataset.concatenate([rows, padding.repeat(missing)])
    batches = len(rows) // batch_size
    if not batches:
        raise _too_few(rows, batch_size)
    local = batch_size // process_count
    dataset = rows[: batches * batch_size].batch(local, drop_remainder=True)
    return dataset[process_index::process_count] if process_count > 1 else dataset


def _growing(
    rows: grain.MapDataset, sizes: "Stages[int]", process_index: int, process_count: int
) -> grain.MapDataset:
    taken = lambda batches: sizes.total(batches, cost=lambda size: size)
    batches = sizes.steps_until(len(rows), cost=lambda size: size)
    batches -= taken(batches) > len(rows)
    if batches < 1:
        raise _too_few(rows, sizes(0))

    def batch(number: int) -> dict[str, np.ndarray]:
        local = sizes(number) // process_count
        start = taken(number) + process_index * local
        picked: list[Any] = [rows[start + i] for i in range(local)]
        return {key: np.stack([row[key] for row in picked]) for key in picked[0]}

    return grain.MapDataset.range(batches).map(batch)


def make_dataset(
    stores: TokenStore | TokenShards | Sequence[TokenStore | TokenShards],
    *,
    batch_size: int,
    length: int,
    seed: int = 0,
    shuffle: bool = True,
    weights: Sequence[float | int] | None = None,
    num_epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    cross_document: bool = False,
    remainder: Literal["drop", "pad"] = "drop",
    num_threads: int = 2,
    prefetch: int = 8,
) -> grain.IterDataset:
    """Return the batches of one token store, of a sharded corpus or of a mixture: `packed_rows`, then `batch_rows`.

    A batch is a dict of arrays of shape ``[batch_size // process_count, length]`` with the keys of
    `PackedTokens`. The iterator has ``get_state`` and ``set_state``, so it can be saved in an
    Orbax checkpoint.

    Args:
        stores: A token store, a sharded corpus, or the components of a mixture.
        batch_size: The number of rows in a global batch.
        length: The number of tokens in a row.
        seed: The seed of the order.
        shuffle: Whether to shuffle; use False for evaluation.
        weights: The share of rows from each store.
        num_epochs: The number of passes over the data; None repeats it forever.
        process_index: The index of this process.
        process_count: The number of processes.
        cross_document: As in `PackedTokens`.
        remainder: ``"drop"`` drops what does not fill a row and a batch; ``"pad"`` pads it with rows of
            weight 0, so that an evaluation counts every token.
        num_threads: The number of threads that read ahead; 0 reads in the caller's thread.
        prefetch: The number of batches to read ahead.

    Raises:
        ValueError: The corpus is too small for one batch, or an argument is out of range.
    """
    if remainder not in ("drop", "pad"):
        raise ValueError(f'remainder must be "drop" or "pad", got {remainder!r}')
    if remainder == "pad" and num_epochs is None:
        raise ValueError('remainder="pad" needs num_epochs, as endless data has no remainder')
    listed = [stores] if isinstance(stores, (TokenStore, TokenShards)) else list(stores)
    if remainder == "drop":
        available = sum(len(pack(store, length)) for store in listed)
        if available < batch_size:
            tokens = sum(store.num_tokens for store in listed)
            raise ValueError(
                f"the corpus is too small for one batch: {tokens} tokens are {available} rows of "
                f"length={length}, fewer than batch_size={batch_size}. Use more text, shorter rows or a "
                "smaller batch."
            )
    rows = packed_rows(
        listed,
        length=length,
        seed=seed,
        shuffle=shuffle,
        weights=weights,
        num_epochs=num_epochs,
        cross_document=cross_document,
        drop_remainder=remainder == "drop",
    )
    return batch_rows(
        rows,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
        pad_to_batch=remainder == "pad",
        num_threads=num_threads,
        prefetch=prefetch,
    )


def _check_stores(stores: Sequence[TokenStore | TokenShards]) -> None:
    if not stores:
        raise ValueError("stores must have at least one token store, got []")
    digests = {store.manifest["tokenizer"] for store in stores}
    if len(digests) > 1:
        raise ValueError(
            "all stores must be encoded with the same tokenizer, got  "
            + ", ".join(
                f"{str(store.folder)!r} ({store.manifest['tokenizer']})" for store in stores
            )
            + ". Build them with one tokenizer, for instance with prepare_mixture."
        )
