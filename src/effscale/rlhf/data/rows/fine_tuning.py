"""Rows of supervised fine-tuning: prompts with the responses to learn, several in a row."""

import bisect
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Shaped

from effscale.rlhf.data.encoder import RecordEncoder
from effscale.rlhf.data.record import Record, RecordError, RecordReport
from effscale.rlhf.data.rows.padding import Account, TooLong, check_too_long

KEYS = ("input_ids", "labels", "loss_weights", "segment_ids", "positions")


def fine_tuning_rows(
    records: Sequence[Record],
    encoder: RecordEncoder,
    *,
    length: int,
    loss_on: Literal["response", "all"] = "response",
    weigh: Literal["token", "record"] = "token",
    pack: bool = True,
    too_long: TooLong = "drop",
    report: RecordReport | None = None,
) -> dict[str, Shaped[np.ndarray, "rows length"]]:
    """Prompts and responses as batches that ``effscale.training.next_token_loss`` takes.

    The keys and their meaning are those of ``effscale.data.PackedTokens``: ``input_ids``, ``labels`` (the token that follows each),
    ``loss_weights``, ``segment_ids`` (1, 2, ... for the records of a row, 0 for padding; a record sees itself alone) and ``positions``
    (from 0 for each record). A record is never divided between two rows.

    Args:
        records: Records with a chosen response; a rejected one is not looked at.
        encoder: Makes ids of them.
        length: The number of tokens in a row.
        loss_on: Whether the response alone is learned, its end included, or the prompt, too, as in DeepSpeed-Chat.
        weigh: Whether every token counts alike, or every record, as in BLOOMZ: the tokens of a record then share a weight of 1, so that long
            answers do not drown short ones.
        pack: Whether to put several records into a row, each where it leaves the least room, the longest first; or one.
        too_long: What to do with a record that is longer than a row: ``"drop"`` and count it, or ``"cut"`` off the end of its
            response, as DeepSpeed-Chat does.
        report: Receives the count of records that were left out, which a warning tells as well.

    Raises:
        ValueError: A record has no chosen response, an argument is out of range, or nothing is left.

    References:
        Yao et al., "DeepSpeed-Chat", 2023; Muennighoff et al., "Crosslingual generalization through multitask finetuning", 2022 (packing
        in which records do not see each other).

    Example:
        >>> from effscale.data import train_tokenizer
        >>> encoder = RecordEncoder(tokenizer=train_tokenizer(["abc"], vocab_size=257))
        >>> rows = fine_tuning_rows([Record(prompt="ab", chosen="c"), Record(prompt="a", chosen="c")], encoder, length=6)
        >>> rows["loss_weights"].tolist()
        [[0.0, 1.0, 1.0, 1.0, 1.0, 0.0]]
        >>> rows["segment_ids"].tolist()
        [[1, 1, 1, 2, 2, 0]]
    """
    if length < 1:
        raise ValueError(f"length={length}: must be at least 1")
    if loss_on not in ("response", "all"):
        raise ValueError(f'loss_on={loss_on!r}: must be "response" or "all"')
    if weigh not in ("token", "record"):
        raise ValueError(f'weigh={weigh!r}: must be "token" or "record"')
    check_too_long(too_long)
    account = Account(records, report)
    sequences = []
    for index, record in enumerate(records):
        if record.chosen is None:
            raise ValueError(f"record {index} has no chosen response to learn")
        try:
            prompt, response = encoder.pair(record)
        except RecordError as error:
            account.drop(error.reason, index, error.detail)
            continue
        ids = [*prompt, *response]
        # The last token is a label only.
        if len(ids) > length + 1 and (too_long == "drop" or len(prompt) > length):
            account.drop("too_long", index, f"{len(ids)} tokens, and a row has {length}")
            continue
        ids = ids[: length + 1]
        learned = 1 if loss_on == "all" else len(prompt)
        sequences.append((ids, max(learned, 1)))
    account.close()
    sizes = [len(ids) - 1 for ids, _ in sequences]
    places = _packed(sizes, length) if pack else [(i, 0, 1) for i in range(len(sizes))]
    rows = 1 + max(row for row, _, _ in places)
    out = {
        key: np.zeros((rows, length), np.float32 if key == "loss_weights" else np.int32)
        for key in KEYS
    }
    for key in ("input_ids", "labels"):
        out[key][:] = encoder.padding
    for (ids, learned), (row, start, segment) in zip(sequences, places, strict=True):
        count = len(ids) - 1
        here = row, slice(start, start + count)
        out["input_ids"][here] = ids[:-1]
        out["labels"][here] = ids[1:]
        share = 1 if weigh == "token" else 1 / (count + 1 - learned)
        out["loss_weights"][row, start + learned - 1 : start + count] = share
        out["segment_ids"][here] = segment
        out["positions"][here] = np.arange(count)
    return out


def _packed(sizes: Sequence[int], length: int) -> list[tuple[int, int, int]]:
    """For each sequence its row, where it begins there, and the how-many-eth it is, from 1.

    The longest first, each goes where it leaves the least room, or begins a row (best fit decreasing).
    """
    rooms: list[
        tuple[int, int]
    ] = []  # what is left of each row that is not full, in order, and the row
    counts: list[int] = []
    places = [(0, 0, 0)] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[index]
        at = bisect.bisect_left(rooms, (size, -1))
        if at < len(rooms):
            room, row = rooms.pop(at)
        else:
            room, row = length, len(counts)
            counts.append(0)
        counts[row] += 1
        places[index] = row, length - room, counts[row]
        if room > size:
            bisect.insort(rooms, (room - size, row))
    return places
