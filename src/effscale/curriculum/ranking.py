"""Samples in order of difficulty."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer, Shaped

# Rankings may be larger than memory, so that nothing of their length is computed at once.
BLOCK = 1 << 20


class Ranking(NamedTuple):
    """Sample ids from the easiest to the hardest.

    The arrays may be memory-mapped, as those of a `DifficultyIndex` are.

    Attributes:
        samples: The ids, sorted by (value, id): a permutation of ``range(n)``.
        values: Their difficulties in that order, so they never fall.
    """

    samples: Integer[np.ndarray, " n"]
    values: Shaped[np.ndarray, " n"]


def rank(values: Shaped[np.ndarray, " n"]) -> Ranking:
    """Rank samples by difficulty; samples of one difficulty stay in the order of their ids.

    Args:
        values: The difficulty of sample 0, 1, ...: integers, floats or booleans.

    Raises:
        ValueError: There are no values, they cannot be ordered, or one is NaN.

    >>> rank(np.array([3, 1, 3, 0])).samples.tolist()
    [3, 1, 0, 2]
    """
    if not len(values):
        raise ValueError("no values: a ranking needs at least one sample.")
    if values.dtype.kind not in "biuf":
        raise ValueError(f"values of dtype {values.dtype}: difficulties must be real numbers.")
    if values.dtype.kind == "f":
        missing = np.flatnonzero(np.isnan(values))
        if len(missing):
            raise ValueError(
                f"the difficulty of sample {missing[0]} is {values[missing[0]]} (and of "
                f"{len(missing) - 1} more): a metric must give each sample a number."
            )
    samples = np.argsort(values, kind="stable")
    return Ranking(samples, values[samples])


def check_ranking(ranking: Ranking) -> None:
    """Raise a ValueError that says what is wrong unless this is a ranking.

    It costs a pass over the ids and the values, and a byte of memory per sample. The order of equal values does not
    matter.
    """
    samples, values = ranking
    n = len(samples)
    if len(values) != n or not n:
        raise ValueError(f"a ranking of {n} samples and {len(values)} values: give one for each.")
    seen = np.zeros(n, bool)
    for block in blocks(n):
        ids = samples[block]
        if ids.min() < 0 or ids.max() >= n:
            break
        seen[ids] = True
    if not seen.all():
        raise ValueError(
            f"the samples of a ranking must be each of 0 to {n - 1} once; they go from "
            f"{samples.min()} to {samples.max()} and hold {len(np.unique(samples))} different ids."
        )
    for block in blocks(n):
        here = values[block.start : block.stop + 1]
        # NaN compares false, so it is found too.
        falls = np.flatnonzero(~(here[1:] >= here[:-1]))
        if len(falls):
            at = block.start + int(falls[0])
            raise ValueError(
                f"the values of a ranking must not fall: {values[at]} is followed by "
                f"{values[at + 1]} at place {at + 1}. `rank` makes a ranking from values by sample."
            )


def raise_stages(
    stage: Integer[np.ndarray, " n"],
    samples: Integer[np.ndarray, " n"],
    bounds: Sequence[int],
) -> None:
    """Raise the stages of samples, in place, to at least those of their places in a ranking.

    Args:
        stage: By sample.
        samples: The ids of a ranking.
        bounds: Where the stages 0, 1, ... begin in it: from 0, never falling.

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
    """Stretches of a table, one after another."""
    return (slice(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK))
