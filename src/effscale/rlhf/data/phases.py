"""Choose the records that each phase of RLHF learns from, and their order."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Int

from effscale.data import Splits
from effscale.data.seeds import check_seed
from effscale.options import Bounds, NonNegativeInt, Options, PositiveFloat, PositiveInt, check
from effscale.rlhf.data.record import Record


def phase_split(
    count: int, shares: str | Sequence[float | int] = (2, 4, 4), *, seed: int = 1234
) -> tuple[Int[np.ndarray, "_"], ...]:
    """Split records between phases, like DeepSpeed-Chat's ``--data_split``: the same indices for the same seed.

    No record is in two phases, and every record is in one.

    Args:
        count: Number of records.
        shares: A share for each phase, as numbers or as DeepSpeed's string; only their proportions count. The usual
            phases are fine-tuning, reward model and PPO.
        seed: Seed of the permutation; the default is DeepSpeed-Chat's.

    Returns:
        For each phase, the indices of its records.

    Example:
        >>> [part.tolist() for part in phase_split(13, "2,4,4")]
        [[10, 0, 12], [9, 2, 11, 7, 1], [8, 4, 5, 6, 3]]
    """
    check_seed(seed)
    if seed >= 2**32:
        raise ValueError(f"seed must be below 2**32, got {seed}")
    if count < 0:
        raise ValueError(f"count must be 0 or more, got {count}")
    given = shares
    try:
        shares = [float(s) for s in (shares.split(",") if isinstance(shares, str) else shares)]
    except ValueError:
        shares = []
    if not shares or not all(0 <= s < math.inf for s in shares) or not sum(shares):
        raise ValueError(
            f"shares must be numbers of 0 or more, not all 0, such as '2,4,4', got {given!r}"
        )
    total = sum(shares)
    edges = [0, *itertools.accumulate(round(share / total * count) for share in shares)]
    # The excess from rounding is subtracted from all boundaries, as in the original; there a boundary can become
    # negative, so that records are in two phases.
    excess = edges[-1] - count
    edges = [0, *(min(max(edge - excess, 0), count) for edge in edges[1:])]
    order = np.arange(count)
    np.random.RandomState(seed).shuffle(order)
    return tuple(order[start:stop] for start, stop in itertools.pairwise(edges))


def split_by_prompt(records: Iterable[Record], splits: Splits) -> dict[str, list[Record]]:
    """Split records into named parts by their prompts, so that no prompt is in two parts, however often it occurs.

    Args:
        records: The records.
        splits: Names of the parts and their shares.

    Example:
        >>> records = [Record(prompt=f"{i} + 1?", chosen=str(i + 1)) for i in range(100)]
        >>> parts = split_by_prompt(records, Splits(fractions={"train": 0.9, "held_out": 0.1}))
        >>> {name: len(part) for name, part in parts.items()}
        {'train': 92, 'held_out': 8}
    """
    parts: dict[str, list[Record]] = {name: [] for name in splits.fractions}
    for record in records:
        parts[splits.assign(record.as_text())].append(record)
    return parts


@dataclass(frozen=True, kw_only=True)
class Blend(Options):
    """The order of records from several sources: every epoch has a different order, and repeats no record.

    Without weights, an epoch has all records of all sources. With weights, it draws from the sources in that
    proportion and ends when the first source would run out. If an epoch uses only a part of a source, the next epoch
    uses another part.

    Attributes:
        sizes: The number of records in each source.
        weights: The share of records from each source in an epoch; None means in proportion to the sizes.
        seed: Seed of the order.

    Example:
        >>> blend = Blend(sizes=(100, 10), weights=(0.75, 0.25))
        >>> blend.counts
        (30, 10)
        >>> blend.epoch(0).shape
        (40, 2)
    """

    sizes: Annotated[tuple[PositiveInt, ...], Bounds(at_least=1)]
    weights: tuple[PositiveFloat, ...] | None = None
    seed: NonNegativeInt = 0

    def __post_init__(self):
        super().__post_init__()
        each = self.weights is None or len(self.weights) == len(self.sizes)
        check(self, each, "weights", f"one entry for each of the {len(self.sizes)} sources")

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of records of each source in an epoch."""
        if self.weights is None:
            return self.sizes
        # Rounding errors must not drop a record of the source that runs out first.
        total = min(size / weight for size, weight in zip(self.sizes, self.weights, strict=True))
        return tuple(
            max(1, min(size, math.floor(total * weight + 1e-6)))
            for size, weight in zip(self.sizes, self.weights, strict=True)
        )

    def __len__(self) -> int:
        return sum(self.counts)

    def epoch(self, number: int) -> Int[np.ndarray, "records 2"]:
        """Return the records of an epoch in order: for each, its source and its index in the source."""
        if number < 0:
            raise ValueError(f"number must be 0 or more, got {number}: epochs are counted from 0")
        parts = []
        for source, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            # This number of epochs uses each record of a source once.
            cycle, part = divmod(number, size // count)
            order = _generator(self.seed, 1, source, cycle).permutation(size)
            chosen = order[part * count : (part + 1) * count]
            parts.append(np.stack([np.full(count, source), chosen], 1))
        rows = np.concatenate(parts)
        return rows[_generator(self.seed, 0, number).permutation(len(rows))]


def _generator(*words: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(words))
