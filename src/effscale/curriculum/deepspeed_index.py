"""Difficulty indexes that DeepSpeed's data analyzer wrote.

For a metric it leaves, each as an indexed data set (:func:`effscale.data.megatron.read_indexed`): ``_index_to_sample``,
whose item i is the ids of the samples of the i-th smallest value; ``_index_to_metric``, whose item i is that value;
``_sample_to_metric``, the value of each sample in order; and, of a metric that is summed over all samples,
``_metric_value``. ``_index_to_sample_percentile_merged`` is ``_index_to_sample`` with neighbouring items joined.

The ids number the data set that was analyzed. Megatron's GPT data sets shuffle their samples, so rows for such an index must
come from the same ``.npy`` files that the analysis used.
"""

import os

import numpy as np
from jaxtyping import Integer

from effscale.curriculum.ranking import Ranking, check_ranking
from effscale.data.megatron import CorruptIndexedDataError, read_indexed


def ranking_from_deepspeed(
    index_to_sample: str | os.PathLike[str],
    index_to_metric: str | os.PathLike[str] | None = None,
) -> Ranking:
    """Read a difficulty index.

    Args:
        index_to_sample: The path of ``..._index_to_sample`` without ``.idx`` and ``.bin``.
        index_to_metric: That of ``..._index_to_metric``. Without it the values of the ranking are its places,
            0, 1, 2, ...: enough for difficulties by percentile, for which the merged file serves as well.

    Raises:
        FileNotFoundError: A file is missing.
        CorruptIndexedDataError: A file is damaged, the two do not belong together, or the ids are not those of a data
            set: each of 0 to n-1 once.
    """
    data = read_indexed(index_to_sample)
    samples = data.values.astype(np.int64)
    if index_to_metric is None:
        values = np.arange(len(samples))
    else:
        items = np.diff(data.bounds)
        values = np.repeat(_levels(index_to_metric, len(items)), items)
        # The analyzer's processes may have left the ids of one value in any order.
        order = np.lexsort((samples, values))
        samples, values = samples[order], values[order]
    ranking = Ranking(samples, values)
    try:
        check_ranking(ranking)
    except ValueError as error:
        # Versions of the analyzer that miscount batches of several fields write some ids twice.
        path = os.fspath(index_to_sample) + ".bin"
        raise CorruptIndexedDataError(path, "ids", "each sample once", error) from error
    return ranking


def metric_from_deepspeed(path: str | os.PathLike[str]) -> Integer[np.ndarray, " values"]:
    """Read the values of ``..._sample_to_metric``, by sample, or of ``..._metric_value``, such as counts of tokens.

    ``rank`` makes a ranking of the former; ``VocabularyRarity`` takes the latter.

    Args:
        path: The path without ``.idx`` and ``.bin``.

    Raises:
        FileNotFoundError: A file is missing.
        CorruptIndexedDataError: A file is damaged.
    """
    return np.array(read_indexed(path).values)


def _levels(path: str | os.PathLike[str], wanted: int) -> np.ndarray:
    """One value for each item of the other file, rising."""
    data = read_indexed(path)
    if len(data.bounds) != wanted + 1 or (np.diff(data.bounds) != 1).any():
        raise CorruptIndexedDataError(
            os.fspath(path) + ".idx",
            "items",
            f"one value for each of {wanted} items of the samples' index (not of the one merged by percentile)",
            f"{len(data.values)} values in {len(data.bounds) - 1} items",
        )
    if (data.values[1:] <= data.values[:-1]).any():
        raise CorruptIndexedDataError(
            os.fspath(path) + ".bin", "values", "rising numbers", "some that do not rise"
        )
    return data.values
