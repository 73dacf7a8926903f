"""Rows of prompts for a model to answer, padded on the left."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped

from effscale.rlhf.data.encoder import RecordEncoder
from effscale.rlhf.data.record import Record, RecordError, RecordReport
from effscale.rlhf.data.rows.padding import (
    Account,
    TooLong,
    bucket_of,
    check_lengths,
    check_too_long,
    pad_rows,
)

Rows = dict[str, Shaped[np.ndarray, "prompts ..."]]


def prompt_rows(
    records: Sequence[Record],
    encoder: RecordEncoder,
    *,
    lengths: Sequence[int] = (256,),
    too_long: TooLong = "drop",
    report: RecordReport | None = None,
) -> dict[int, Rows]:
    """Convert prompts to arrays of a few shapes: each prompt in the shortest length that fits.

    The arrays are the input of the step from ``effscale.rlhf.make_policy_step``: ``input_ids``, padded on the left;
    ``attention_mask``, true at real tokens; and ``records``, the index of each prompt's record, for rewards that need
    it.

    Args:
        records: Records; their responses are ignored.
        encoder: The encoder for prompts.
        lengths: The lengths of rows; each one costs a compilation of generation and training. DeepSpeed-Chat uses
            one.
        too_long: What to do with a longer prompt: ``"drop"`` and count it, as DeepSpeed-Chat does, or ``"cut"`` off
            its beginning (tokens that the tokenizer adds before every text are kept).
        report: If given, receives the counts of records that were left out; they are logged as a warning too.

    Returns:
        For each length that occurs, its prompts, in the order of the records.

    Raises:
        ValueError: An argument is out of range, or nothing is left.

    Example:
        >>> from effscale.data import train_tokenizer
        >>> encoder = RecordEncoder(tokenizer=train_tokenizer(["abc"], vocab_size=257))
        >>> rows = prompt_rows([Record(prompt="ab"), Record(prompt="abcabc")], encoder, lengths=(3, 6))
        >>> rows[3]["attention_mask"].tolist(), rows[6]["records"].tolist()
        ([[False, True, True]], [1])
    """
    lengths = check_lengths(lengths)
    check_too_long(too_long)
    account = Account(records, report)
    found: dict[int, list[tuple[list[int], int]]] = {n: [] for n in lengths}
    for index, record in enumerate(records):
        try:
            ids = encoder.prompt(record.prompt)
        except RecordError as error:
            account.drop(error.reason, index, error.detail)
            continue
        if not ids:
            account.drop("empty", index, "the prompt has no token")
            continue
        if len(ids) > lengths[-1] and too_long == "drop":
            account.drop(
                "too_long", index, f"{len(ids)} tokens, but the longest row has {lengths[-1]}"
            )
            continue
        ids = _cut(ids, lengths[-1], encoder.beginning)
        bucket = bucket_of(len(ids), lengths)
        assert bucket is not None
        found[bucket].append((ids, index))
    account.close()
    return {n: _rows(prompts, n, encoder.padding) for n, prompts in found.items() if prompts}


def _cut(ids: list[int], length: int, beginning: tuple[int, ...]) -> list[int]:
    if len(ids) <= length:
        return ids
    keep = len(beginning) if ids[: len(beginning)] == list(beginning) else 0
    keep = keep if keep < length else 0
    return [*ids[:keep], *ids[len(ids) - length + keep :]]


def _rows(prompts: list[tuple[list[int], int]], length: int, pad_token_id: int) -> Rows:
    ids, indices = zip(*prompts, strict=True)
    tokens, mask = pad_rows(ids, length, pad_token_id, side="left")
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "records": np.array(indices, np.int32),
    }
