import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effscale.data import PackedTokens


def reference(documents, length, cross_document, drop_remainder, pad_token_id):
    """Rows token by token, from the definition."""
    tokens = [(token, number) for number, document in enumerate(documents) for token in document]
    rows = []
    for start in range(0, max(len(tokens) - 1, 0), length):
        row = {k: [] for k in ("input_ids", "labels", "loss_weights", "segment_ids", "positions")}
        segment, position = 1, 0
        for at in range(start, start + length):
            if at + 1 >= len(tokens):
                for key in row:
                    row[key].append(pad_token_id if key in ("input_ids", "labels") else 0)
                continue
            (token, document), (label, following) = tokens[at], tokens[at + 1]
            if at > start:
                new = document != tokens[at - 1][1] and not cross_document
                segment, position = (segment + 1, 0) if new else (segment, position + 1)
            row["input_ids"].append(token)
            row["labels"].append(label)
            row["loss_weights"].append(1.0 if cross_document or document == following else 0.0)
            row["segment_ids"].append(segment)
            row["positions"].append(position)
        if start + length < len(tokens) or not drop_remainder:
            rows.append(row)
    return rows


corpora = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), max_size=12)


@given(
    documents=corpora,
    length=st.integers(1, 8),
    cross_document=st.booleans(),
    drop_remainder=st.booleans(),
)
def test_rows_are_those_of_the_definition(
    make_store, documents, length, cross_document, drop_remainder
):
    options = {
        "cross_document": cross_document,
        "drop_remainder": drop_remainder,
        "pad_token_id": 3,
    }
    packed = PackedTokens(make_store(documents, vocab_size=100), length, **options)
    expected = reference(documents, length, **options)
    assert len(packed) == len(expected)
    for row, wanted in zip((packed[i] for i in range(len(packed))), expected, strict=True):
        assert {key: value.tolist() for key, value in row.items()} == wanted


@given(documents=corpora, length=st.integers(1, 8))
def test_no_label_is_lost_or_doubled(make_store, documents, length):
    packed = PackedTokens(make_store(documents, vocab_size=100), length, drop_remainder=False)
    labels = []
    for index in range(len(packed)):
        row = packed[index]
        labels += row["labels"][row["loss_weights"] > 0].tolist()
        assert (row["positions"] < length).all()
        real = row["segment_ids"] > 0
        assert (row["loss_weights"][~real] == 0).all()
        assert sorted(set(row["segment_ids"][real])) == list(range(1, row["segment_ids"].max() + 1))
    # All tokens but the first of each document, in order.
    assert labels == [token for document in documents for token in document[1:]]


def test_dtypes_and_order_of_access(make_store):
    packed = PackedTokens(make_store([[1, 2, 3, 4, 5]] * 9), 4)
    rows = [packed[i] for i in (5, 0, 5)]
    dtypes = {key: value.dtype for key, value in rows[0].items()}
    assert dtypes == {
        "input_ids": np.int32,
        "labels": np.int32,
        "loss_weights": np.float32,
        "segment_ids": np.int32,
        "positions": np.int32,
    }
    for key in rows[0]:
        np.testing.assert_array_equal(rows[0][key], rows[2][key])
    # Rows are copies: changing one does not reach the store.
    rows[0]["input_ids"][:] = 0
    assert packed[5]["input_ids"].tolist() == rows[2]["input_ids"].tolist()


def test_high_ids_survive(make_store):
    packed = PackedTokens(make_store([[70_000, 65_536, 1]], vocab_size=70_001), 2)
    assert packed[0]["labels"].tolist() == [65_536, 1]


def test_it_pickles_without_its_data(make_store):
    packed = PackedTokens(make_store([[1, 2, 3]] * 1000), 8)
    data = pickle.dumps(packed)
    assert len(data) < 1000
    assert pickle.loads(data)[7]["labels"].tolist() == packed[7]["labels"].tolist()


def test_bad_arguments_are_refused(make_store):
    store = make_store([[1, 2, 3]])
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        PackedTokens(store, 0)
    with pytest.raises(ValueError, match=r"pad_token_id must be from 0 to .*got 1000"):
        PackedTokens(store, 2, pad_token_id=1000)
    with pytest.raises(IndexError, match="row must be from 0 to 0, got 1"):
        PackedTokens(store, 2)[1]
    assert len(PackedTokens(make_store([]), 2, drop_remainder=False)) == 0
