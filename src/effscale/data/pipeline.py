"""Batches for training: shuffled, mixed, split over processes, and resumable to the batch."""

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
"""grain shuffles numbers of 32 bits."""


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
    """The rows of one store, of shards or of a mixture, in the order of training.

    A `grain.MapDataset`: any further transformation of grain applies to it.

    Args:
        stores: The store, a corpus in shards, or the components of a mixture.
        length: Tokens in a row.
        seed: Decides the order; each epoch has its own.
        shuffle: Whether to shuffle the rows of each store.
        weights: The share of rows from each store; by default in proportion to their rows.
        num_epochs: How often to go through the data, without end if None. A mixture ends when the
            first of its components has been gone through so often.
        cross_document: As in `PackedTokens`.
        drop_remainder: As in `PackedTokens`.

    Raises:
        ValueError: A store holds less than a row, the stores' vocabularies differ, or an argument
            is out of range.
    """
    stores = [stores] if isinstance(stores, (TokenStore, TokenShards)) else list(stores)
    _check_stores(stores)
    if weights is not None and len(weights) != len(stores):
        raise ValueError(f"{len(weights)} weights for {len(stores)} stores: give one for each.")
    if weights is not None and not all(np.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"weights={list(weights)}: each must be finite and above 0.")
    if num_epochs is not None and num_epochs < 1:
        raise ValueError(f"num_epochs={num_epochs}: it must be at least 1, or None for no end.")
    check_seed(seed)
    components, sizes = [], []
    for index, store in enumerate(stores):
        rows = pack(store, length, cross_document=cross_document, drop_remainder=drop_remainder)
        if not len(rows):
            raise ValueError(
                f"{str(store.folder)!r} has {store.num_tokens} tokens, less than one row of "
                f"length={length} and its next token: use a shorter length or more text."
            )
        dataset = grain.MapDataset.source(rows)
        if shuffle and len(rows) > MAX_ROWS:
            raise ValueError(
                f"{str(store.folder)!r} makes {len(rows)} rows of length={length}, and at most {MAX_ROWS} can be shuffled "
                "together: use longer rows, or divide the corpus into several components of a mixture."
            )
        if shuffle:
            # grain adds the epoch's number to the seed, so components need seeds far apart.
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
    """Batches rows, each process reading only its own.

    Global batch ``b`` is rows ``b * batch_size`` to ``(b + 1) * batch_size`` whatever the number of
    processes; process ``p`` gets the ``p``-th of ``process_count`` equal, contiguous parts of it.
    That is the layout of a batch axis sharded over processes in order, and concatenating the
    processes' parts gives the batch of a single process.

    The iterator's state (``get_state``, ``set_state``) is the number of batches taken, the same on all
    processes, so a run can resume on another number of processes, with the same ``batch_size``.

    Args:
        rows: The rows, in order.
        batch_size: Rows in a global batch; or the number for each batch, as `effscale.training.batch_ramp` gives it. The rows
            are then dealt out in the same order, without a gap.
        process_index: Which process this is.
        process_count: How many there are.
        pad_to_batch: Fill the last batch with rows of zeros (no weight, no segment) instead of leaving it out.
        num_threads: Threads that read ahead; 0 reads in the caller's thread.
        prefetch: Batches to read ahead.

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
            raise ValueError("pad_to_batch=True needs batches of one size")
        dataset = _growing(rows, batch_size, process_index, process_count)
    else:
        dataset = _even(rows, batch_size, process_index, process_count, pad_to_batch)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return dataset.to_iter_dataset(options)


def _check_batch(batch_size: int, process_index: int, process_count: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: it must be at least 1.")
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index={process_index}: it must be from 0 to process_count-1="
            f"{process_count - 1}."
        )
    if batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} does not divide over process_count={process_count} "
            f"processes: use a multiple, such as {-(-batch_size // process_count) * process_count}."
        )


def _too_few(rows: grain.MapDataset, batch_size: int) -> ValueError:
    return ValueError(
        f"the corpus has {len(rows)} rows and batch_size={batch_size}: "
        "use a smaller batch, shorter rows or more text."
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
    """The batches of one token store, of shards or of a mixture: `packed_rows`, then `batch_rows`.

    A batch is a dict of arrays of shape ``[batch_size // process_count, length]`` with the keys of
    `PackedTokens`. ``iter()`` of the result has ``get_state`` and ``set_state`` and goes into an
    orbax checkpoint as it is.

    Args:
        stores: The store, a corpus in shards, or the components of a mixture.
        batch_size: Rows in a global batch.
        length: Tokens in a row.
        seed: Decides the order.
        shuffle: Whether to shuffle; evaluation wants False.
        weights: The share of rows from each store.
        num_epochs: How often to go through the data, without end if None.
        process_index: Which process this is.
        process_count: How many there are.
        cross_document: As in `PackedTokens`.
        remainder: ``"drop"`` what does not fill a row and a batch, or ``"pad"`` it with rows of
            weight 0, so that an evaluation counts every token.
        num_threads: Threads that read ahead; 0 reads in the caller's thread.
        prefetch: Batches to read ahead.

    Raises:
        ValueError: The corpus is too small for one batch, or an argument is out of range.
    """
    if remainder not in ("drop", "pad"):
        raise ValueError(f'remainder={remainder!r}: it must be "drop" or "pad".')
    if remainder == "pad" and num_epochs is None:
        raise ValueError('remainder="pad" without num_epochs: endless data has no remainder.')
    listed = [stores] if isinstance(stores, (TokenStore, TokenShards)) else list(stores)
    if remainder == "drop":
        available = sum(len(pack(store, length)) for store in listed)
        if available < batch_size:
            tokens = sum(store.num_tokens for store in listed)
            raise ValueError(
                f"the corpus is too small for one batch: {tokens} tokens make {available} rows of "
                f"length={length} and batch_size={batch_size}. Use more text, shorter rows or a "
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
        raise ValueError("stores=[]: give at least one token store.")
    digests = {store.manifest["tokenizer"] for store in stores}
    if len(digests) > 1:
        raise ValueError(
            "the stores were encoded with different tokenizers: "
            + ", ".join(
                f"{str(store.folder)!r} ({store.manifest['tokenizer']})" for store in stores
            )
            + ". Build them with one tokenizer (prepare_mixture does)."
        )
