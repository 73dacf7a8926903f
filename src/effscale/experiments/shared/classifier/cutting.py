"""Cut documents into labeled passages, for the task of classifying which document a passage comes from."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from effscale.experiments.shared.classifier.batches import Texts

TRAIN = "train"


def cut_passages(
    documents: Sequence[Any], size: int, asked: Mapping[str, int], *, field: str
) -> dict[str, Texts]:
    """Cut the same number of passages from each document; the class of a passage is its document.

    Training passages come from the first three quarters of a document and all others from the last quarter, spread
    evenly and without overlap. Several other splits alternate.

    Args:
        documents: Token ids of each document.
        size: Tokens per passage.
        asked: Number of passages over all documents, for ``train`` and other splits.
        field: The config field with these numbers, for messages, such as ``Config.finetune``.

    Returns:
        The passages of each split.

    Raises:
        ValueError: A document is too short.

    Example:
        >>> made = cut_passages([range(24), range(100, 124)], 2, {"train": 6, "test": 2}, field="Config")
        >>> made["train"].ids
        ((0, 1), (6, 7), (12, 13), (100, 101), (106, 107), (112, 113))
        >>> made["test"].ids, made["test"].labels.tolist()
        (((18, 19), (118, 119)), [0, 1])
    """
    classes = len(documents)
    each = {split: count // classes for split, count in asked.items()}
    later = [split for split in asked if split != TRAIN]
    # Each split's share of the last quarter, in turns.
    turns = [split for _, split in sorted(((i + 0.5) / each[s], s) for s in later for i in range(each[s]))]  # fmt: skip
    rows: dict[str, list[tuple[int, ...]]] = {split: [] for split in asked}
    for label, document in enumerate(documents):
        length = len(document)
        cut = length * 3 // 4 // size
        for splits, numbers in (
            ([TRAIN] * each[TRAIN], np.arange(cut)),
            (turns, np.arange(cut, length // size)),
        ):
            if len(numbers) < len(splits):
                names = sorted(set(splits))
                given = " and ".join(f"{field}.{name}={asked[name]}" for name in names)
                raise ValueError(
                    f"{given}: must be at most {classes * len(numbers)} with classes={classes} and passage={size}, because document "
                    f"{label} has {length} tokens"
                )
            even = np.linspace(0, len(numbers), len(splits), endpoint=False).astype(int)
            for split, number in zip(splits, numbers[even], strict=True):
                passage = document[int(number) * size : (int(number) + 1) * size]
                rows[split].append(tuple(int(token) for token in passage))
    labels = {split: np.repeat(np.arange(classes), count) for split, count in each.items()}
    return {split: Texts(tuple(ids), labels[split], size) for split, ids in rows.items()}
