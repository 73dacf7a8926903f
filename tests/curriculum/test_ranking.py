import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from effscale.curriculum.ranking import Ranking, check_ranking, rank


@hypothesis.given(st.lists(st.integers(-3, 3), min_size=1, max_size=30))
def test_samples_are_sorted_by_value_and_id(values):
    ranking = rank(np.array(values))
    pairs = sorted((value, sample) for sample, value in enumerate(values))
    assert ranking.samples.tolist() == [sample for _, sample in pairs]
    assert ranking.values.tolist() == [value for value, _ in pairs]
    check_ranking(ranking)


def test_infinities_are_ranked_and_nan_is_named():
    assert rank(np.array([np.inf, 0.0, -np.inf])).samples.tolist() == [2, 1, 0]
    with pytest.raises(ValueError, match=r"sample 1 must be a number, got nan \(also for 1 more"):
        rank(np.array([0.0, np.nan, 1.0, np.nan], np.float32))


def test_values_that_cannot_be_ranked():
    with pytest.raises(ValueError, match="at least one sample"):
        rank(np.zeros(0))
    with pytest.raises(ValueError, match="dtype complex128"):
        rank(np.zeros(2, complex))


@pytest.mark.parametrize(
    ("samples", "values", "message"),
    [
        ([0, 1], [1, 2, 3], "each of its 2 samples, got 3"),
        ([0, 2], [1, 2], "from 0 to 2, 2 of them different"),
        ([0, -1], [1, 2], "from -1 to 0"),
        ([1, 1, 0], [1, 2, 3], "each of 0 to 2 once, got ids from 0 to 1, 2 of them different"),
        ([0, 1, 2], [1, 3, 2], "got 3 followed by 2 at position 2"),
        ([0, 1], [1.0, np.nan], "followed by nan"),
    ],
)
def test_what_is_not_a_ranking(samples, values, message):
    with pytest.raises(ValueError, match=message):
        check_ranking(Ranking(np.array(samples), np.array(values)))
