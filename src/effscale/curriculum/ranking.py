"""Samples in order of difficulty."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Integer, Shaped


class Ranking(NamedTuple):
    """Sample ids from the easiest to the hardest.

    Attributes:
        samples: The ids, sorted by (value, id): a permutation of ``range(n)``.
        values: Their difficulties in that order, so they never fall.
    """

    samples: Integer[np.ndarray, " n"]
    values: Shaped[np.ndarray, " n"]


def rank(values: Shaped[np.ndarray, " n"]) -> Ranking:
    """Ranks samples by difficulty; samples of one difficulty stay in the order of their ids.

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
    """Raises a ValueError that says what is wrong unless this is a ranking.

    It costs a pass over the ids and one over the values; the order of equal values does not matter.
    """
    samples, values = ranking
    n = len(samples)
    if len(values) != n or not n:
        raise ValueError(f"a ranking of {n} samples and {len(values)} values: give one for each.")
    counts = np.zeros(n, bool)
    if samples.min() >= 0 and samples.max() < n:
        counts[samples] = True
    if not counts.all():
        raise ValueError(
            f"the samples of a ranking must be each of 0 to {n - 1} once; they go from "
            f"{samples.min()} to {samples.max()} and hold {len(np.unique(samples))} different ids."
        )
    # NaN compares false, so it is found too.
    falls = np.flatnonzero(~(values[1:] >= values[:-1]))
    if len(falls):
        at = int(falls[0])
        raise ValueError(
            f"the values of a ranking must not fall: {values[at]} is followed by "
            f"{values[at + 1]} at place {at + 1}. `rank` makes a ranking from values by sample."
        )
