"""Samples in order of difficulty."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer, Shaped

# Rankings may be larger than memory, so they are processed in blocks.
BLOCK = 1 << 20


class Ranking(NamedTuple):
    """Sample ids from the easiest to the hardest.

    The arrays may be memory-mapped, as those of a `DifficultyIndex` are.

    Attributes:
        samples: The ids, sorted by (value, id): a permutation of ``range(n)``.
        values: The difficulties in this order, so they never decrease.
    """

    samples: Integer[np.ndarray, " n"]
    values: Shaped[np.ndarray, " n"]


def rank(values: Shaped[np.ndarray, " n"]) -> Ranking:
    """Rank samples by difficulty; samples with the same difficulty stay in the order of their ids.

    Args:
        values: The difficulty of sample 0, 1, ...: integers, floats or booleans.

    Raises:
        ValueError: ``values`` is empty, its type has no order, or a value is NaN.

    >>> rank(np.array([3, 1, 3, 0])).samples.tolist()
    [3, 1, 0, 2]
    """
    if not len(values):
        raise ValueError("values must have at least one sample")
    if values.dtype.kind not in "biuf":
        raise ValueError(f"values must be real numbers, got dtype {values.dtype}")
    if values.dtype.kind == "f":
        missing = np.flatnonzero(np.isnan(values))
        if len(missing):
            raise ValueError(
                f"the difficulty of sample {missing[0]} must be a number, got {values[missing[0]]} (also for "
                f"{len(missing) - 1} more samples)"
            )
    samples = np.argsort(values, kind="stable")
    return Ranking(samples, values[samples])


def check_ranking(ranking: Ranking) -> None:
    """Raise a ValueError that describes the problem unless this is a valid ranking.

    The check takes a pass over the ids and the values, and a byte of memory per sample. The order of equal values does not
    matter.
    """
    samples, values = ranking
    n = len(samples)
    if len(values) != n or not n:
        raise ValueError(
            f"a ranking must have one value for each of its {n} samples, got {len(values)}"
        )
    seen = np.zeros(n, bool)
    for block in blocks(n):
        ids = samples[block]
        if ids.min() < 0 or ids.max() >= n:
            break
        seen[ids] = True
    if not seen.all():
        raise ValueError(
            f"the samples of a ranking must be each of 0 to {n - 1} once, got ids from "
            f"{samples.min()} to {samples.max()}, {len(np.unique(samples))} of them different"
        )
    for block in blocks(n):
        here = values[block.start : block.stop + 1]
        # NaN compares false, so it is found too.
        falls = np.flatnonzero(~(here[1:] >= here[:-1]))
        if len(falls):
            at = block.start + int(falls[0])
            raise ValueError(
                f"the values of a ranking must not decrease, got {values[at]} followed by "
                f"{values[at + 1]} at position {at + 1}. Use `rank` to create a ranking from values by sample."
            )


def raise_stages(
    stage: Integer[np.ndarray, " n"],
    samples: Integer[np.ndarray, " n"],
    bounds: Sequence[int],
) -> None:
    """Raise the stages of samples, in place, to at least those of their positions in a ranking.

    Args:
        stage: The stage of each sample.
        samples: The ids of a ranking.
        bounds: The positions in the ranking at which the stages 0, 1, ... start: from 0, never decreasing.

    >>> stage = np.array([0, 3, 0, 0])
    >>> raise_stages(stage, np.array([2, 1, 0, 3]), [0, 1, 3])
    >>> stage
    array([1, 3, 0, 2])
    """
    for block in blocks(len(samples)):
        ids, places = samples[block], np.arange(block.start, block.stop)
        wanted = np.searchsorted(bounds, places, side="right") - 1
        stage[ids] = np.maximum(stage[ids], wanted.astype(stage.dtype))


def blocks(length: int) -> Iterator[slice]:
    """Yield consecutive blocks of a table."""
    return (slice(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK))
