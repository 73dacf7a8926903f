"""Metrics against loops written from the paper's formulas."""

import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from effscale.curriculum.metrics import (
    LengthThenRarity,
    TokenCounts,
    VocabularyRarity,
    sequence_length,
)

COUNTS = np.array([50, 20, 10, 5, 1, 0, 0, 3])


def slow_rarity(tokens, counts=COUNTS):
    counts = [max(int(count), 1) for count in counts]
    total = sum(counts)
    return int(sum(-math.log(counts[token] / total) for token in tokens))


def padded(rows, length, left=False):
    ids, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), np.int32)
    for index, row in enumerate(rows):
        where = slice(length - len(row), length) if left else slice(len(row))
        ids[index, where], mask[index, where] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


rows_of_tokens = st.lists(
    st.lists(st.integers(0, 7), min_size=1, max_size=40), min_size=1, max_size=5
)


def test_sequence_length_is_that_of_the_mask_or_the_segments_or_the_row():
    ids = np.zeros((2, 5), np.int32)
    mask = np.array([[1, 1, 0, 0, 0], [0, 0, 1, 1, 1]])
    assert sequence_length({"input_ids": ids, "attention_mask": mask}).tolist() == [2, 3]
    segments = np.array([[1, 2, 2, 3, 0], [1, 1, 1, 1, 1]])
    assert sequence_length({"input_ids": ids, "segment_ids": segments}).tolist() == [4, 5]
    assert sequence_length({"input_ids": ids}).tolist() == [5, 5]
    both = {"input_ids": ids, "segment_ids": segments, "attention_mask": mask}
    assert sequence_length(both).tolist() == [2, 3]


@hypothesis.given(rows_of_tokens, st.integers(0, 9), st.booleans())
def test_rarity_of_padded_rows_is_that_of_their_real_tokens(rows, more, left):
    batch = padded(rows, max(map(len, rows)) + more, left)
    # Labels of masked language modeling do not count.
    batch["labels"] = np.full_like(batch["input_ids"], -100)
    assert VocabularyRarity(COUNTS)(batch).tolist() == [slow_rarity(row) for row in rows]


@hypothesis.given(rows_of_tokens)
def test_rarity_of_rows_for_next_token_prediction_counts_the_last_label(rows):
    longest = max(map(len, rows))
    # As PackedTokens pads: zeros, in segment 0.
    whole = padded(rows, longest)
    batch = {
        "input_ids": np.pad(whole["input_ids"], ((0, 0), (0, 1)))[:, :-1],
        "labels": np.roll(whole["input_ids"], -1, axis=1),
        "segment_ids": whole["attention_mask"],
    }
    after = [3] * len(rows)
    for index, row in enumerate(rows):
        batch["labels"][index, len(row) - 1] = after[index]
    expected = [slow_rarity([*row, label]) for row, label in zip(rows, after, strict=True)]
    assert VocabularyRarity(COUNTS)(batch).tolist() == expected


def test_a_last_label_of_minus_100_is_no_token():
    # Rows that were shifted and padded with -100, and one without a label at all.
    ids = np.array([[5, 4, 3], [1, 2, 0], [7, 7, 7]])
    labels = np.array([[4, 3, -100], [2, 0, 6], [-100, -100, -100]])
    rows = [[5, 4, 3], [1, 2, 0, 6], [7, 7, 7]]
    for segments in ({}, {"segment_ids": np.ones_like(ids)}):
        batch = {"input_ids": ids, "labels": labels, **segments}
        assert VocabularyRarity(COUNTS)(batch).tolist() == [slow_rarity(row) for row in rows]
        flat = [token for row in rows for token in row]
        assert TokenCounts(8)(batch).tolist() == [flat.count(k) for k in range(8)]


def test_rarity_truncates_the_sum_and_not_its_terms():
    # p = 1/2 each: 10 ln 2 = 6.93, while the terms truncate to 0.
    metric = VocabularyRarity(np.array([4, 4]))
    values = metric({"input_ids": np.zeros((1, 10), np.int32)})
    assert values.tolist() == [6]
    assert values.dtype == np.int64


@pytest.mark.parametrize("length", range(10, 40, 3))
def test_rarity_adds_one_token_after_the_other_whatever_the_padding(length):
    metric = VocabularyRarity(np.array([1]))
    metric.rarity = np.array([0.1])
    total = 0.0
    for _ in range(10):
        total += 0.1
    assert total < 1  # added in pairs it is 1
    assert metric(padded([[0] * 10], length)).tolist() == [0]


def test_rarity_takes_an_unseen_token_as_seen_once():
    assert VocabularyRarity(np.array([9, 0])).rarity[1] == pytest.approx(math.log(10))


def test_rarity_of_a_row_of_padding_or_of_nothing_is_zero():
    nothing = np.zeros((2, 0), np.int32)
    assert VocabularyRarity(COUNTS)({"input_ids": nothing, "labels": nothing}).tolist() == [0, 0]
    ids = np.array([[7, 7]])
    batch = {"input_ids": ids, "labels": ids, "segment_ids": np.zeros_like(ids)}
    assert VocabularyRarity(COUNTS)(batch).tolist() == [0]


@hypothesis.given(rows_of_tokens)
def test_length_then_rarity_follows_the_formula_and_length_goes_first(rows):
    metric = LengthThenRarity(COUNTS, max_length=40)
    most = 40 * max(-math.log(max(int(c), 1) / sum(max(int(c), 1) for c in COUNTS)) for c in COUNTS)
    coefficient = 10 ** (math.ceil(math.log10(most)) + 1)
    values = metric(padded(rows, 40)).tolist()
    assert values == [len(row) * coefficient + slow_rarity(row) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: values[i])
    assert order == sorted(range(len(rows)), key=lambda i: (len(rows[i]), slow_rarity(rows[i])))


@hypothesis.given(rows_of_tokens)
def test_token_counts_are_those_of_the_real_tokens(rows):
    flat = [token for row in rows for token in row]
    assert TokenCounts(8)(padded(rows, 50)).tolist() == [flat.count(k) for k in range(8)]


@pytest.mark.parametrize("wrong", [8, -1])
def test_a_token_without_a_count_is_an_error_that_names_it(wrong):
    ids = np.array([[0, 1], [2, wrong]])
    with pytest.raises(ValueError, match=f"token {wrong} in row 1"):
        VocabularyRarity(COUNTS)({"input_ids": ids})
    with pytest.raises(ValueError, match=f"token {wrong} in row 1"):
        TokenCounts(8)({"input_ids": ids})
    # In padding anything may stand.
    batch = {"input_ids": ids, "attention_mask": np.array([[1, 1], [1, 0]])}
    assert VocabularyRarity(COUNTS)(batch).tolist() == [slow_rarity([0, 1]), slow_rarity([2])]


def test_impossible_metrics_are_refused():
    with pytest.raises(ValueError, match="counts"):
        VocabularyRarity(np.array([3, -1]))
    with pytest.raises(ValueError, match="counts"):
        VocabularyRarity(np.zeros(0, np.int64))
    with pytest.raises(ValueError, match="got max_length=0"):
        LengthThenRarity(COUNTS, 0)
    with pytest.raises(ValueError, match="vocab_size must be at least 1, got 0"):
        TokenCounts(0)
    with pytest.raises(ValueError, match=r"max_length must be at least 4, .*got 3"):
        LengthThenRarity(COUNTS, 3)({"input_ids": np.zeros((1, 4), np.int32)})
