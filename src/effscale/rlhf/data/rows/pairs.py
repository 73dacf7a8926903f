"""Rows of preferences: for the reward model's losses, and for DPO."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

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


class PairRows(NamedTuple):
    """Pairs of one length, padded on the right: what :func:`effscale.rlhf.diverging` takes.

    Attributes:
        chosen: Tokens of the prompt and the preferred response.
        rejected: Tokens of the prompt and the other one.
        chosen_lengths: How many of each row are no padding.
        rejected_lengths: The same of the others.
        prompt_lengths: How many of each row are the prompt's.
        records: Which record each pair is.
    """

    chosen: Int[np.ndarray, "pairs length"]
    rejected: Int[np.ndarray, "pairs length"]
    chosen_lengths: Int[np.ndarray, " pairs"]
    rejected_lengths: Int[np.ndarray, " pairs"]
    prompt_lengths: Int[np.ndarray, " pairs"]
    records: Int[np.ndarray, " pairs"]

    def masks(self) -> tuple[Bool[np.ndarray, "pairs length"], Bool[np.ndarray, "pairs length"]]:
        """Where the tokens of chosen and of rejected are no padding, whatever the token of the padding is."""
        place = np.arange(self.chosen.shape[1])[None]
        return place < self.chosen_lengths[:, None], place < self.rejected_lengths[:, None]

    def response_masks(
        self,
    ) -> tuple[Bool[np.ndarray, "pairs length"], Bool[np.ndarray, "pairs length"]]:
        """Where they are the response's: those whose log-probabilities DPO adds up."""
        after = np.arange(self.chosen.shape[1])[None] >= self.prompt_lengths[:, None]
        chosen, rejected = self.masks()
        return chosen & after, rejected & after


def pair_rows(
    records: Sequence[Record],
    encoder: RecordEncoder,
    *,
    lengths: Sequence[int] = (512,),
    too_long: TooLong = "drop",
    report: RecordReport | None = None,
) -> dict[int, PairRows]:
    """Pairs as arrays of few shapes: each pair in the shortest length that is enough for both of its responses.

    Args:
        records: Records with a chosen and a rejected response.
        encoder: Makes ids of them.
        lengths: The lengths of rows; each is one more compilation.
        too_long: What to do with a pair that is longer than all of them: ``"drop"`` and count it, or ``"cut"`` off the ends of its
            responses. A pair of which nothing that differs would be left is dropped in any case.
        report: Receives the count of records that were left out, which a warning tells as well.

    Returns:
        For each length that occurs its pairs, in the order of the records.

    Raises:
        ValueError: A record has no two responses, an argument is out of range, or nothing is left.

    Example:
        >>> from effscale.data import train_tokenizer
        >>> encoder = RecordEncoder(tokenizer=train_tokenizer(["abc"], vocab_size=257), pad_id=0)
        >>> rows = pair_rows([Record(prompt="a", chosen="bc", rejected="b")], encoder, lengths=(4, 8))[4]
        >>> rows.chosen_lengths.tolist(), rows.rejected_lengths.tolist(), rows.prompt_lengths.tolist()
        ([4], [3], [1])
    """
    lengths = check_lengths(lengths)
    check_too_long(too_long)
    account = Account(records, report)
    found: dict[int, list[tuple[list[int], list[int], int, int]]] = {n: [] for n in lengths}
    for index, record in enumerate(records):
        for name in ("chosen", "rejected"):
            if getattr(record, name) is None:
                raise ValueError(f"record {index} has no {name} response: a pair needs both")
        try:
            prompt, chosen = encoder.pair(record)
            rejected = encoder.pair(record, "rejected")[1]
        except RecordError as error:
            account.drop(error.reason, index, error.detail)
            continue
        pair = [*prompt, *chosen], [*prompt, *rejected]
        size = max(map(len, pair))
        if size > lengths[-1] and too_long == "drop":
            account.drop("too_long", index, f"{size} tokens, and the longest row has {lengths[-1]}")
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


def _rows(pairs: list[tuple[list[int], list[int], int, int]], length: int, pad_id: int) -> PairRows:
    chosen, rejected, prompts, indices = zip(*pairs, strict=True)
    whole = lambda values: np.array(list(values), np.int32)
    return PairRows(
        pad_rows(chosen, length, pad_id, side="right")[0],
        pad_rows(rejected, length, pad_id, side="right")[0],
        whole(map(len, chosen)),
        whole(map(len, rejected)),
        whole(prompts),
        whole(indices),
    )
