import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effscale.data import unigram_entropy
from effscale.data.statistics import token_counts


def test_known_entropies(make_store):
    assert unigram_entropy(make_store([[0, 1, 2, 3]] * 3)) == pytest.approx(math.log(4))
    assert unigram_entropy(make_store([[5, 5, 5]])) == pytest.approx(0, abs=1e-12)
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert unigram_entropy(make_store([[1, 2], [2, 2]])) == pytest.approx(expected)
    assert unigram_entropy([make_store([[1, 2]]), make_store([[2, 2]])]) == pytest.approx(expected)


@given(documents=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), max_size=6))
def test_counts_are_those_of_the_tokens(make_store, documents):
    store = make_store(documents, vocab_size=10)
    expected = [sum(document.count(token) for document in documents) for token in range(10)]
    assert token_counts(store).tolist() == expected
    assert token_counts(store).dtype == np.int64


def test_an_empty_store_has_no_entropy(make_store):
    with pytest.raises(ValueError, match="no tokens"):
        unigram_entropy(make_store([]))
