"""Difficulty indexes written by DeepSpeed's data analyzer.

For each metric it writes these indexed datasets (``effscale.data.megatron.read_indexed``): ``_index_to_sample``,
whose item i is the ids of the samples with the i-th smallest value; ``_index_to_metric``, whose item i is that value;
``_sample_to_metric``, the value of each sample in order; and, for a metric that is summed over all samples,
``_metric_value``. ``_index_to_sample_percentile_merged`` is ``_index_to_sample`` with neighboring items joined.

The ids are positions in the dataset that was analyzed. Megatron's GPT datasets shuffle their samples, so rows for such an index
must come from the same ``.npy`` files that the analysis used.
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
    """Read a ranking from a difficulty index of DeepSpeed.

    Args:
        index_to_sample: The path of ``..._index_to_sample`` without ``.idx`` and ``.bin``.
        index_to_metric: The path of ``..._index_to_metric``. Without it, the values of the ranking are its positions,
            0, 1, 2, ...: enough for difficulties by percentile, for which you can also use the merged file.

    Raises:
        FileNotFoundError: A file is missing.
        CorruptIndexedDataError: A file is damaged, the two do not belong together, or the ids are not those of a
            dataset: each of 0 to n-1 once.
    """
    data = read_indexed(index_to_sample)
    samples = data.values.astype(np.int64)
    if index_to_metric is None:
        values = np.arange(len(samples))
    else:
        items = np.diff(data.bounds)
        values = np.repeat(_levels(index_to_metric, len(items)), items)
        # The analyzer's processes may have written the ids of a value in any order.
        order = np.lexsort((samples, values))
        samples, values = samples[order], values[order]
    ranking = Ranking(samples, values)
    try:
        check_ranking(ranking)
    except ValueError as error:
        # Some versions of the analyzer miscount batches with several fields and write some ids twice.
        path = os.fspath(index_to_sample) + ".bin"
        raise CorruptIndexedDataError(path, "ids", "each sample once", error) from error
    return ranking


def metric_from_deepspeed(path: str | os.PathLike[str]) -> Integer[np.ndarray, " values"]:
    """Read the values of ``..._sample_to_metric``, by sample, or of ``..._metric_value``, such as counts of tokens.

    Pass the former to ``rank``, and the latter to ``VocabularyRarity``.

    Args:
        path: The path without ``.idx`` and ``.bin``.

    Raises:
        FileNotFoundError: A file is missing.
        CorruptIndexedDataError: A file is damaged.
    """
    return np.array(read_indexed(path).values)


def _levels(path: str | os.PathLike[str], wanted: int) -> np.ndarray:
    """Read one value for each item of the other file, in increasing order."""
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
            os.fspath(path) + ".bin", "values", "increasing numbers", "some that do not increase"
        )
    return data.values
