"""Rows for supervised fine-tuning: prompts with the responses to learn, several packed into a row."""

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
    """Convert prompts and responses to rows for ``effscale.training.next_token_loss``.

    The keys are those of ``effscale.data.PackedTokens``: ``input_ids``, ``labels`` (the next token of each),
    ``loss_weights``, ``segment_ids`` (1, 2, ... for the records of a row, 0 for padding; records do not attend to
    each other) and ``positions`` (from 0 for each record). A record is never split between two rows.

    Args:
        records: Records with a chosen response; a rejected response is ignored.
        encoder: The encoder for prompts and responses.
        length: Number of tokens in a row.
        loss_on: ``"response"`` trains only on the response, including its end; ``"all"`` also on the prompt, as in
            DeepSpeed-Chat.
        weigh: ``"token"`` gives every token the same weight; ``"record"`` gives every record the same weight, as in
            BLOOMZ. The tokens of a record then share a weight of 1, so that long answers do not outweigh short ones.
        pack: Whether to pack several records into a row (best fit, the longest first), or only one.
        too_long: What to do with a record that is longer than a row: ``"drop"`` and count it, or ``"cut"`` off the
            end of its response, as DeepSpeed-Chat does.
        report: If given, receives the counts of records that were left out; they are logged as a warning too.

    Raises:
        ValueError: A record has no chosen response, an argument is out of range, or nothing is left.

    References:
        Yao et al., "DeepSpeed-Chat: Easy, Fast and Affordable RLHF Training of ChatGPT-like Models at All Scales"
            (2023). https://arxiv.org/abs/2308.01320
        Muennighoff et al., "Crosslingual Generalization through Multitask Finetuning" (2022), for packing in which
            records do not attend to each other. https://arxiv.org/abs/2211.01786

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
        raise ValueError(f"length must be at least 1, got {length}")
    if loss_on not in ("response", "all"):
        raise ValueError(f'loss_on must be "response" or "all", got {loss_on!r}')
    if weigh not in ("token", "record"):
        raise ValueError(f'weigh must be "token" or "record", got {weigh!r}')
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
        # The last token is only a label.
        if len(ids) > length + 1 and (too_long == "drop" or len(prompt) > length):
            account.drop("too_long", index, f"{len(ids)} tokens, but a row has {length}")
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
    """Return for each sequence its row, its start in the row, and its number in the row, counted from 1.

    Best fit decreasing: from the longest to the shortest, each goes to the row where it leaves the least space, or
    begins a new row.
    """
    rooms: list[
        tuple[int, int]
    ] = []  # remaining space of each row that is not full, in order, and the row
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
