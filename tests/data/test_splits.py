import pytest
from hypothesis import given
from hypothesis import strategies as st

from effscale.data import Document, Splits, write_splits
from effscale.data.sampling import sample_texts


def test_fractions_hold_and_do_not_depend_on_place():
    splits = Splits(fractions={"train": 0.8, "validation": 0.15, "test": 0.05})
    texts = [f"document {i}" for i in range(5000)]
    names = [splits.assign(text) for text in texts]
    for name, fraction in splits.fractions.items():
        # Four standard deviations of a binomial.
        margin = 4 * (fraction * (1 - fraction) / len(texts)) ** 0.5
        assert abs(names.count(name) / len(texts) - fraction) < margin
    assert [splits.assign(text) for text in reversed(texts)] == names[::-1]
    assert names != [Splits(fractions=splits.fractions, seed=1).assign(text) for text in texts]


def test_known_assignments():
    """Fixed values: a change here would move documents between the parts of existing corpora."""
    splits = Splits(fractions={"train": 0.5, "validation": 0.5})
    names = "".join(splits.assign(f"text {i}")[0] for i in range(16))
    assert names == "tvtvvvtvvvvvttvt"


@given(text=st.text(), seed=st.integers(0, 2**64 - 1))
def test_a_larger_part_only_gains(text, seed):
    small = Splits(fractions={"train": 0.3, "rest": 0.7}, seed=seed)
    large = Splits(fractions={"train": 0.6, "rest": 0.4}, seed=seed)
    assert small.assign(text) != "train" or large.assign(text) == "train"


def test_parts_of_size_zero_get_nothing():
    splits = Splits(fractions={"none": 0.0, "all": 1.0, "nothing": 0.0})
    assert {splits.assign(str(i)) for i in range(100)} == {"all"}


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ({}, "at least one"),
        ({"a": 0.5}, "must sum to 1.*sum to 0.5"),
        ({"a": 1.5, "b": -0.5}, r"fractions\['a'\] must be from 0 to 1, got 1.5"),
    ],
)
def test_impossible_fractions_are_refused(fractions, message):
    with pytest.raises(ValueError, match=message):
        Splits(fractions=fractions)


def test_one_pass_writes_all_parts_and_copies_stay_together(tokenizer, tmp_path):
    texts = [f"document number {i % 40}" for i in range(120)]
    folders = {"train": tmp_path / "train", "validation": tmp_path / "validation"}
    splits = Splits(fractions={"train": 0.7, "validation": 0.3})
    documents = iter([Document(text, "memory") for text in texts])
    stores = write_splits(documents, folders, tokenizer, splits=splits)
    found = {
        name: [tokenizer.decode(store.document(i).tolist()) for i in range(store.num_documents)]
        for name, store in stores.items()
    }
    assert sorted(found["train"] + found["validation"]) == sorted(texts)
    assert not set(found["train"]) & set(found["validation"])
    assert found["train"] == [text for text in texts if splits.assign(text) == "train"]
    with pytest.raises(ValueError, match="one entry for each split"):
        write_splits([], {"train": tmp_path / "x"}, tokenizer, splits=splits)


def test_samples_are_bounded_deterministic_and_without_order():
    documents = [Document(f"{i:04d}" * 5, "") for i in range(500)]
    sample = sample_texts(documents, max_characters=1000)
    assert 900 < sum(map(len, sample)) <= 1000
    assert sample == sample_texts(documents[::-1], max_characters=1000)
    assert sample != sample_texts(documents, max_characters=1000, seed=1)
    # Drawn from the whole corpus, not from its beginning.
    assert max(int(text[:4]) for text in sample) > 400
    assert sorted(sample_texts(documents)) == [document.text for document in documents]
    assert sample_texts([Document("x" * 50, "")], max_characters=10) == ["x" * 10]
    with pytest.raises(ValueError, match="max_characters must be at least 1, got 0"):
        sample_texts(documents, max_characters=0)
