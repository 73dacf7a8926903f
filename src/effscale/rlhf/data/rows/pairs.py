"""Rows of preference pairs: for the reward model's losses, and for DPO."""

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

Rows = dict[str, Shaped[np.ndarray, "pairs ..."]]


def pair_rows(
    records: Sequence[Record],
    encoder: RecordEncoder,
    *,
    lengths: Sequence[int] = (512,),
    too_long: TooLong = "drop",
    report: RecordReport | None = None,
) -> dict[int, Rows]:
    """Convert pairs to arrays of a few shapes: each pair in the shortest length that fits both of its responses.

    The arrays are the input of ``effscale.rlhf.reward_model_loss`` and ``effscale.rlhf.preference_loss``: ``chosen``
    and ``rejected``, the tokens of prompt and response padded on the right; ``chosen_lengths``, ``rejected_lengths``
    and ``prompt_lengths``, which identify padding whatever its token; and ``records``, the index of each pair's
    record.

    Args:
        records: Records with a chosen and a rejected response.
        encoder: The encoder for prompts and responses.
        lengths: The lengths of rows; each one costs a compilation.
        too_long: What to do with a pair that is longer than all of them: ``"drop"`` and count it, or ``"cut"`` off
            the ends of its responses. A pair whose responses would no longer differ is dropped in any case.
        report: If given, receives the counts of records that were left out; they are logged as a warning too.

    Returns:
        For each length that occurs, its pairs, in the order of the records.

    Raises:
        ValueError: A record lacks one of two responses, an argument is out of range, or nothing is left.

    Example:
        >>> from effscale.data import train_tokenizer
        >>> encoder = RecordEncoder(tokenizer=train_tokenizer(["abc"], vocab_size=257), pad_token_id=0)
        >>> rows = pair_rows([Record(prompt="a", chosen="bc", rejected="b")], encoder, lengths=(4, 8))[4]
        >>> {name: rows[name].tolist() for name in ("chosen_lengths", "rejected_lengths", "prompt_lengths")}
        {'chosen_lengths': [4], 'rejected_lengths': [3], 'prompt_lengths': [1]}
    """
    lengths = check_lengths(lengths)
    check_too_long(too_long)
    account = Account(records, report)
    found: dict[int, list[tuple[list[int], list[int], int, int]]] = {n: [] for n in lengths}
    for index, record in enumerate(records):
        if record.chosen is None or record.rejected is None:
            missing = "chosen" if record.chosen is None else "rejected"
            raise ValueError(f"record {index} has no {missing} response, and a pair needs both")
        try:
            prompt, chosen = encoder.pair(record)
            rejected = encoder.response(record.prompt, record.rejected)
        except RecordError as error:
            account.drop(error.reason, index, error.detail)
            continue
        pair = [*prompt, *chosen], [*prompt, *rejected]
        size = max(map(len, pair))
        if size > lengths[-1] and too_long == "drop":
            account.drop("too_long", index, f"{size} tokens, but the longest row has {lengths[-1]}")
            continue
        chosen, rejected = (row[: lengths[-1]] for row in pair)
        if chosen == rejected:
            account.drop(
                "identical", index, "chosen and rejected have the same tokens in their row"
            )
            continue
        bucket = bucket_of(min(size, lengths[-1]), lengths)
        assert bucket is not None
        found[bucket].append((chosen, rejected, len(prompt), index))
    account.close()
    return {n: _rows(pairs, n, encoder.padding) for n, pairs in found.items() if pairs}


def _rows(
    pairs: list[tuple[list[int], list[int], int, int]], length: int, pad_token_id: int
) -> Rows:
    chosen, rejected, prompts, indices = zip(*pairs, strict=True)
    whole = lambda values: np.array(list(values), np.int32)
    return {
        "chosen": pad_rows(chosen, length, pad_token_id, side="right")[0],
        "rejected": pad_rows(rejected, length, pad_token_id, side="right")[0],
        "chosen_lengths": whole(map(len, chosen)),
        "rejected_lengths": whole(map(len, rejected)),
        "prompt_lengths": whole(prompts),
        "records": whole(indices),
    }
