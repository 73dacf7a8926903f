r"""Difficulty metrics: functions from a batch of rows to one number per row.

A batch is a mapping of arrays of shape ``[rows, length]``, with the keys of
`effscale.data.PackedTokens` or those of padded rows (``attention_mask``). If the tokens have another name than
``input_ids``, pass it to a metric as ``field``. Any function from such a
batch to an array of ``[rows]`` finite numbers is a metric; integers are kept as int64 and floating-point
numbers as float64. (The original allows only integers.) To run in several processes, a metric must
be picklable: a function of a module, or an instance of a class of a module.

The metrics here are those of Li et al., "DeepSpeed Data Efficiency" (2022), section 3.1. Its
truncation and reshape need no metric: see `effscale.curriculum.SequenceLengthCurriculum`.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, Integer, Shaped

Batch = Mapping[str, Shaped[np.ndarray, "rows *rest"]]
Metric = Callable[[Batch], Any]

NO_LABEL = -100  # a label outside every vocabulary, which every loss ignores


def tokens_of(batch: Batch, field: str) -> Integer[np.ndarray, "rows length"]:
    """Return the tokens of a batch.

    Raises:
        ValueError: The batch has no field of this name.
    """
    if field not in batch:
        raise ValueError(
            f"a batch must have {field!r}, got {', '.join(map(repr, batch)) or 'nothing'}. Pass the name of its tokens as "
            'field="..."'
        )
    return batch[field]


def real_tokens(batch: Batch, field: str = "input_ids") -> Bool[np.ndarray, "rows length"]:
    """Return where a batch has tokens and no padding.

    This is its ``attention_mask`` if it has one, else where ``segment_ids`` are above 0, else
    everywhere.
    """
    if "attention_mask" in batch:
        return batch["attention_mask"] != 0
    if "segment_ids" in batch:
        return batch["segment_ids"] > 0
    return np.ones(tokens_of(batch, field).shape, bool)


def sequence_length(batch: Batch, *, field: str = "input_ids") -> Int64[np.ndarray, " rows"]:
    """Return the number of tokens in each row, without padding.

    As a metric of another ``field`` use ``functools.partial(sequence_length, field="text")``.

    >>> ids = np.zeros((2, 4), np.int32)
    >>> sequence_length({"input_ids": ids, "attention_mask": np.array([[1, 1, 1, 0], [1, 1, 1, 1]])})
    array([3, 4])
    """
    return real_tokens(batch, field).sum(axis=1, dtype=np.int64)


def _tokens(batch: Batch, field: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens that count and a mask of where they are, each ``[rows, length]`` or ``[rows, length + 1]``.

    A row of ``length`` for next-token prediction consists of ``length + 1`` tokens: its inputs and
    its last label, unless that is -100. A padded row (one with an ``attention_mask``) consists of only its real
    tokens, as its labels may be anything; so rows for masked language modeling should have one.
    """
    ids, real = tokens_of(batch, field), real_tokens(batch, field)
    if "labels" not in batch or "attention_mask" in batch or not ids.shape[1]:
        return ids, real
    # The last real position; in a row of only padding nothing counts.
    last = ids.shape[1] - 1 - np.argmax(real[:, ::-1], axis=1)[:, None]
    label = np.take_along_axis(batch["labels"], last, axis=1)
    counts = np.take_along_axis(real, last, axis=1) & (label != NO_LABEL)
    return np.concatenate([ids, label], axis=1), np.concatenate([real, counts], axis=1)


def _check_ids(ids: np.ndarray, real: np.ndarray, size: int, what: str) -> None:
    if not ids.size or (ids.min() >= 0 and ids.max() < size):
        return
    wrong = real & ((ids < 0) | (ids >= size))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"token {ids[row, column]} in row {row} of the batch is out of range: {what} has ids from 0 to {size - 1}. "
            "Use that of the tokenizer that made these tokens."
        )


class TokenCounts:
    """A function that counts how often each token occurs in a batch; `count_vocabulary` adds up these counts.

    Rows for next-token prediction count all their ``length + 1`` tokens.

    >>> TokenCounts(4)({"input_ids": np.array([[0, 1, 1]]), "labels": np.array([[1, 1, 3]])})
    array([1, 2, 0, 1])
    """

    def __init__(self, vocab_size: int, *, field: str = "input_ids"):
        if vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {vocab_size}")
        self.vocab_size, self.field = vocab_size, field

    def __call__(self, batch: Batch) -> Int64[np.ndarray, " vocab"]:
        """Count how often each token occurs in the batch."""
        ids, real = _tokens(batch, self.field)
        _check_ids(ids, real, self.vocab_size, f"a vocabulary of {self.vocab_size}")
        return np.bincount(ids[real], minlength=self.vocab_size)


class VocabularyRarity:
    r"""Vocabulary rarity: how rare the tokens of a row are, summed over the row.

    $$r(x) = \left\lfloor \sum_i -\ln p(x_i) \right\rfloor, \qquad p_k = \frac{c_k}{\sum_j c_j}, \quad c_k = \max(n_k, 1)$$

    where $n_k$ is how often token k occurs in the corpus. Computed in float64; a token's
    contribution does not depend on the rest of the batch.

    References:
        Li et al., "DeepSpeed Data Efficiency" (2022), section 3.1, metric "voc". https://arxiv.org/abs/2212.03597

    >>> metric = VocabularyRarity(np.array([6, 2, 0]))
    >>> metric({"input_ids": np.array([[0, 0], [2, 1]]), "labels": np.array([[0, 0], [1, 0]])})
    array([1, 4])
    """

    def __init__(self, counts: Integer[np.ndarray, " vocab"], *, field: str = "input_ids"):
        """Compute the rarity of each token.

        Args:
            counts: How often each token occurs, from `count_vocabulary` or `effscale.data.token_counts`.
            field: The name of the tokens in a row.

        Raises:
            ValueError: ``counts`` is empty or has a negative number.
        """
        if not counts.size or counts.min() < 0:
            raise ValueError(
                f"counts must have a number of at least 0 for each token, got {counts!r}"
            )
        counts = np.maximum(counts.astype(np.float64), 1.0)
        self.rarity, self.field = -np.log(counts / counts.sum()), field

    @property
    def digest(self) -> str:
        """The digest, which depends on the counts and the field."""
        content = self.rarity.tobytes() + self.field.encode()
        return hashlib.blake2b(content, digest_size=16).hexdigest()

    def __call__(self, batch: Batch) -> Int64[np.ndarray, " rows"]:
        """Return the rarity of each row."""
        ids, real = _tokens(batch, self.field)
        _check_ids(ids, real, len(self.rarity), "counts")
        rarity = self.rarity.take(ids, mode="clip")
        if not real.all():
            rarity *= real
        # Add sequentially. NumPy's sum adds in pairs, which depend on the shape of the batch, so
        # padding would change the last bits. (The slice and the sum are for rows without tokens.)
        return np.cumsum(rarity, axis=1)[:, -1:].sum(axis=1).astype(np.int64)


class LengthThenRarity:
    r"""A metric that orders rows by ``sequence_length``, and rows of the same length by ``VocabularyRarity``.

    $$\text{length} \cdot 10^{\lceil \log_{10}(L \max_k(-\ln p_k)) \rceil + 1} + r(x)$$

    with L the ``max_length``.

    References:
        Li et al., "DeepSpeed Data Efficiency" (2022), section 3.1, metric "seqreo_voc". https://arxiv.org/abs/2212.03597

    >>> metric = LengthThenRarity(np.array([6, 2]), max_length=4)
    >>> metric({"input_ids": np.array([[1, 1, 0, 0]]), "attention_mask": np.array([[1, 1, 0, 0]])})
    array([202])
    """

    def __init__(
        self, counts: Integer[np.ndarray, " vocab"], max_length: int, *, field: str = "input_ids"
    ):
        """Create the metric.

        Args:
            counts: As for `VocabularyRarity`.
            max_length: The maximum number of tokens in a row.
            field: The name of the tokens in a row.

        Raises:
            ValueError: ``counts`` is empty or has a negative number, ``max_length`` is below 1, or
                there is only one token, so that rarity is undefined.
        """
        self.rarity = VocabularyRarity(counts, field=field)
        self.max_length = max_length
        most = max_length * float(self.rarity.rarity.max())
        if most <= 0:
            raise ValueError(
                f"max_length must be at least 1 and counts must have at least 2 tokens, got max_length={max_length} "
                f"and {len(counts)} counts"
            )
        self.coefficient = 10 ** (math.ceil(math.log10(most)) + 1)

    @property
    def digest(self) -> str:
        """The digest, which depends on the counts and the length."""
        return f"{self.rarity.digest}-{self.max_length}"

    def __call__(self, batch: Batch) -> Int64[np.ndarray, " rows"]:
        """Return the rank of each row."""
        lengths = sequence_length(batch, field=self.rarity.field)
        if lengths.max(initial=0) > self.max_length:
            raise ValueError(
                f"max_length must be at least {lengths.max()}, the tokens of a row, got {self.max_length}"
            )
        return lengths * self.coefficient + self.rarity(batch)
