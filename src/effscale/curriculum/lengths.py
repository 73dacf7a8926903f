"""Sequence-length curriculum: training batches are cut to a growing length.

Rows are tokenized and packed at the full length, and cut on the host just before the step. Only training batches are cut, so
evaluation sees whole rows. There are few lengths (``effscale.training.Pacing``). Each is compiled once, and
``effscale.training.StagedStep`` does so before it is needed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils

from effscale.options import Options, PositiveInt, check
from effscale.training import Stages, stages
from effscale.training.pacing import Pacing
from effscale.training.staged import token_shape

Mode = Literal["truncate", "reshape"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceLengthCurriculum(Options):
    """Sequence-length warmup.

    With ``truncate`` batches keep their number of rows, so the tokens per step grow with the length. Do not ramp up the
    batch size as well. Let the learning rate decay by tokens and warm up by steps
    (``effscale.curriculum.steps_then_tokens``).

    References:
        Li et al., "The Stability-Efficiency Dilemma" (2021), sequence-length warmup (``truncate``).
            https://arxiv.org/abs/2108.06084
        Li et al., "DeepSpeed Data Efficiency" (2022), ``seqtru`` and ``seqres``. https://arxiv.org/abs/2212.03597

    Example:
        >>> import numpy as np
        >>> from effscale.training import LinearPacing
        >>> pacing = LinearPacing(min_difficulty=8, max_difficulty=32, total=300, difficulty_step=8)
        >>> curriculum = SequenceLengthCurriculum(pacing=pacing)
        >>> curriculum.stages(batch_size=4)
        Stages(starts=(0, 99, 199, 299), values=(8, 16, 24, 32))
        >>> batch = {"input_ids": np.zeros((4, 32), np.int32), "labels": np.zeros((4, 32), np.int32)}
        >>> curriculum.shape_batch(batch, 16)["labels"].shape
        (4, 16)
    """

    pacing: Pacing
    """The pacing function of the length; it must end at the full row length."""
    mode: Mode = "truncate"
    """Whether to drop tokens beyond the length (``truncate``) or to cut them into more, shorter rows (``reshape``)."""
    multiple_of: PositiveInt = 1
    """Round lengths up to a multiple of this number; the original uses 8 for BERT."""
    rows_multiple_of: PositiveInt = 2
    """``reshape`` produces a multiple of this number of rows. The original uses 2; a sharded or accumulated batch needs a
    multiple of its parts. With several processes it applies to each process."""
    field: str = "input_ids"
    """The name of the tokens in a batch. Arrays of the same shape are cut in the same way."""

    def __post_init__(self):
        super().__post_init__()
        shortest, longest = self.pacing(0), self.pacing(self.pacing.end)
        wanted = f"a schedule of lengths of at least 1, but it starts at {shortest}"
        check(self, shortest >= 1, "pacing", wanted)
        divisor = f"a divisor of the full length {longest}"
        check(self, longest % self.multiple_of == 0, "multiple_of", divisor)

    def check(self, length: int) -> None:
        """Raise a ValueError unless the schedule ends at ``length``, that of full rows.

        ``shape_batch`` does this too: if the lengths never reach the full rows, the model has not seen its
        last positions at the end of training.
        """
        longest = self.pacing(self.pacing.end)
        if longest != length:
            raise ValueError(
                f"SequenceLengthCurriculum.pacing must end at the row length {length}, got {longest}. "
                f"Let the pacing end at {length}, or pack rows of {longest} tokens."
            )

    def stages(self, batch_size: int, *, process_count: int = 1) -> Stages[int]:
        """Return the length at each training step.

        Args:
            batch_size: The number of full-length rows in a batch over all processes. Only the clocks ``samples`` (rows read) and
                ``tokens`` (inputs trained on) need it.
            process_count: The number of processes that share a batch, ``jax.process_count()``. Each reshapes its own rows, so
                with ``reshape`` the number of pieces, and which pieces a batch contains, depend on it.

        Raises:
            ValueError: ``process_count`` does not divide the rows of a batch.
        """
        if process_count < 1 or batch_size % process_count:
            raise ValueError(
                f"process_count must be a divisor of batch_size={batch_size}, got {process_count}"
            )
        full, own_rows = self.pacing(self.pacing.end), batch_size // process_count

        def tokens(length: int) -> int:
            length = self._rounded(length)
            if self.mode == "truncate":
                return batch_size * length
            pieces = reshaped_rows(own_rows, full, length, self.rows_multiple_of)
            return length * pieces * process_count

        cost = tokens if self.pacing.clock == "tokens" else lambda length: batch_size
        return stages(self.pacing, cost=cost).map(self._rounded)

    def shape_batch(self, batch: Mapping[str, Any], length: int) -> dict[str, Any]:
        """Return the batch with the length of a stage. Pass this method and ``stages`` to ``effscale.training.StagedStep``."""
        self.check(token_shape(batch, self.field)[1])
        if self.mode == "truncate":
            return truncate(batch, length, field=self.field)
        return reshape(batch, length, rows_multiple_of=self.rows_multiple_of, field=self.field)

    def _rounded(self, length: int) -> int:
        return -(-length // self.multiple_of) * self.multiple_of


def truncate(batch: Mapping[str, Any], length: int, *, field: str = "input_ids") -> dict[str, Any]:
    """Return the first ``length`` tokens of each row, with their labels; the rest is dropped.

    Arrays with the shape ``(rows, seq)`` of the tokens are cut, as views; everything else is unchanged. As ``labels`` are
    already shifted, the last input keeps its label, the first token beyond the cut.

    Args:
        batch: A batch with tokens of shape ``(rows, seq)``.
        length: The length, from 1 to ``seq``.
        field: The name of the tokens.

    Returns:
        The batch with rows of ``length`` tokens.

    Raises:
        ValueError: ``length`` is out of range, or ``field`` is missing or does not have two dimensions.

    References:
        Li et al., "The Stability-Efficiency Dilemma" (2021), section 4. https://arxiv.org/abs/2108.06084
        Li et al., "DeepSpeed Data Efficiency" (2022), ``seqtru``. https://arxiv.org/abs/2212.03597
    """
    shape = token_shape(batch, field)
    _check_length(length, shape[1])
    per_token = lambda x: getattr(x, "shape", None) == shape
    return {name: x[:, :length] if per_token(x) else x for name, x in batch.items()}


def reshape(
    batch: Mapping[str, Any], length: int, *, rows_multiple_of: int = 2, field: str = "input_ids"
) -> dict[str, Any]:
    r"""Cut each row into pieces of ``length`` tokens, so that a step has about the same number of tokens as at full length.

    A row has $W$ tokens including its last label. A piece takes $c = \text{length} + 1$ of them, the last one only as a
    label. Each row is cut from its start into $\lfloor W/c \rfloor$ pieces, row by row. After these come the last $c$ tokens
    of each row, which overlap with its other pieces. The batch keeps the first $\lceil \text{rows} \cdot W/c \rceil$ of all
    pieces, rounded down to a multiple of ``rows_multiple_of``, so its number of rows depends only on shapes. At the full
    length, the batch is returned unchanged.

    To the model a piece is like a packed row: ``positions`` start at 0, even for a document that started earlier.
    ``segment_ids``, ``loss_weights`` and other arrays of shape ``(rows, seq)`` are those of its tokens. Arrays with
    another shape and a leading dimension of ``rows`` repeat the row's entry for each of its pieces; everything else is unchanged.

    Args:
        batch: A batch of NumPy arrays, with tokens of shape ``(rows, seq)``.
        length: The length of a piece, from 1 to ``seq``.
        rows_multiple_of: See above. If there are fewer rows than this, they are kept.
        field: The name of the tokens.

    Returns:
        A batch of ``reshaped_rows(rows, seq, length, rows_multiple_of)`` rows of ``length``.

    Raises:
        ValueError: As for ``truncate``.

    Example:
        >>> batch = {"input_ids": np.arange(9)[None], "labels": np.arange(1, 10)[None]}
        >>> reshape(batch, 3, rows_multiple_of=1)["input_ids"].tolist()  # 10 tokens, 4 per piece
        [[0, 1, 2], [4, 5, 6], [6, 7, 8]]

    References:
        Li et al., "DeepSpeed Data Efficiency" (2022), ``seqres``, with the layout of Megatron-DeepSpeed.
            https://arxiv.org/abs/2212.03597
    """
    rows, width = shape = token_shape(batch, field)
    _check_length(length, width)
    if length == width:
        return dict(batch)
    pieces = (width + 1) // (length + 1)
    count = reshaped_rows(rows, width, length, rows_multiple_of)
    starts = np.concatenate(
        [np.tile(np.arange(pieces) * (length + 1), rows), np.full(rows, width - length)]
    )[:count]
    sources = np.concatenate([np.repeat(np.arange(rows), pieces), np.arange(rows)])[:count]
    columns = starts[:, None] + np.arange(length)

    def cut(name: str, x: Any) -> Any:
        if getattr(x, "shape", None) == shape:
            piece = x[sources[:, None], columns]
            return _from_zero(piece) if name == "positions" else piece
        return x[sources] if getattr(x, "shape", ())[:1] == (rows,) else x

    return {name: cut(name, x) for name, x in batch.items()}


def reshaped_rows(rows: int, seq: int, length: int, rows_multiple_of: int = 2) -> int:
    """Return the number of rows that ``reshape`` produces.

    >>> reshaped_rows(8, 1023, 127), reshaped_rows(8, 1023, 500), reshaped_rows(8, 1023, 1023)
    (64, 16, 8)
    """
    if length == seq:
        return rows
    count = -(-rows * (seq + 1) // (length + 1))
    return count - count % rows_multiple_of if count >= rows_multiple_of else count


def truncate_padded(
    batch: Mapping[str, Any],
    length: int | None = None,
    multiple_of: int = 8,
    *,
    field: str = "input_ids",
) -> dict[str, Any]:
    """Cut padded rows, as for BERT, at a length that is rounded up to a multiple.

    With ``length=None`` no real token is lost: the length is that of the longest row, up to the last nonzero entry of
    ``attention_mask``, over the batches of all processes (which all must call this function). Batches of rows with similar
    lengths, as drawn by a curriculum over lengths, then cost little padding. Each distinct length is a compilation:
    choose ``multiple_of`` so that there are few.

    Args:
        batch: A batch with tokens of shape ``(rows, seq)`` and, for ``length=None``, an ``attention_mask`` of this shape.
        length: Where to cut, before rounding; None: see above.
        multiple_of: The length is rounded up to a multiple of this number, but at most to ``seq``.
        field: The name of the tokens.

    Returns:
        The batch with shorter rows.

    Raises:
        ValueError: As for ``truncate``, or ``attention_mask`` is missing.

    Example:
        >>> mask = np.arange(16)[None] < 5
        >>> truncate_padded({"input_ids": np.ones((1, 16)), "attention_mask": mask})["input_ids"].shape
        (1, 8)

    References:
        Li et al., "DeepSpeed Data Efficiency" (2022), ``seqtru`` and ``seqreo`` for BERT. https://arxiv.org/abs/2212.03597
    """
    shape = token_shape(batch, field)
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be at least 1, got {multiple_of}")
    if length is None:
        if getattr(batch.get("attention_mask"), "shape", None) != shape:
            raise ValueError(
                f"length=None needs an attention_mask of shape {shape}. Add one, or pass a length."
            )
        length = _longest(np.asarray(batch["attention_mask"]))
    _check_length(length, shape[1])
    return truncate(batch, min(-(-length // multiple_of) * multiple_of, shape[1]), field=field)


def _longest(mask: np.ndarray) -> int:
    """Return the length of the longest row over all processes, at least 1."""
    columns = np.flatnonzero(mask.any(axis=0))
    longest = int(columns[-1]) + 1 if columns.size else 1
    if jax.process_count() > 1:
        longest = int(multihost_utils.process_allgather(np.int32(longest)).max())
    return longest


def _from_zero(positions: np.ndarray) -> np.ndarray:
    """Count a document that starts before the piece from the start of the piece; those that start in it are already right."""
    follows = np.diff(positions, axis=1) == 1
    first = np.pad(
        np.logical_and.accumulate(follows, axis=1), ((0, 0), (1, 0)), constant_values=True
    )
    return np.where(first, positions - positions[:, :1], positions)


def _check_length(length: int, width: int) -> None:
    if not 1 <= length <= width:
        raise ValueError(f"length must be from 1 to the rows' {width} tokens, got {length}")
