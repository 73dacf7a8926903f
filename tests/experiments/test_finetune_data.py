import gzip
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effscale.experiments.shared import assets
from effscale.experiments.shared.classifier import data as finetune_data
from effscale.experiments.shared.classifier.batches import (
    DEVIATION,
    MEAN,
    Images,
    Texts,
    TrainingBatches,
    evaluation_batches,
    linear_weights,
)

FASHION = pathlib.Path("/usr/share/datasets/fashion-mnist")


def idx(array):
    """The IDX format, from its definition."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


def texts(lengths, max_length=40):
    """Texts of which each holds its own number only, so that a row of a batch tells which it is."""
    ids = tuple((i + 1,) * length for i, length in enumerate(lengths))
    return Texts(ids, np.arange(len(lengths)), max_length)


def images(count):
    return Images(np.zeros((count, 2, 2), np.uint8), np.arange(count), 1.0, 2)


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=70)


@given(lengths, st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_an_epoch_holds_each_example_at_most_once_in_full_batches(lengths, size, seed, sized):
    examples = texts(lengths) if sized else images(len(lengths))
    batches = TrainingBatches(examples, batch_size=size, seed=seed)
    for _ in range(2 if batches.per_epoch else 0):
        epoch = [next(batches) for _ in range(batches.per_epoch)]
        labels = np.concatenate([batch["labels"] for batch in epoch])
        assert len(set(labels)) == len(labels) == len(lengths) // size * size
        assert all((batch["weights"] == 1).all() for batch in epoch)


@given(lengths, st.integers(1, 9))
def test_a_text_is_padded_to_a_quarter_of_the_longest(lengths, size):
    for batch in evaluation_batches(texts(lengths), size):
        ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
        longest = max(lengths[label] for label in labels)
        assert ids.shape[1] == -(-longest // 10) * 10
        for row, real, label in zip(ids, mask, labels, strict=True):
            assert row[real == 1].tolist() == [label + 1] * lengths[label]
            assert real.tolist() == [1] * lengths[label] + [0] * (ids.shape[1] - lengths[label])


@given(lengths, st.integers(1, 9), st.booleans())
def test_an_evaluation_counts_each_example_once(lengths, size, sized):
    examples = texts(lengths) if sized else images(len(lengths))
    seen = []
    for batch in evaluation_batches(examples, size):
        assert len(batch["labels"]) == size
        seen += batch["labels"][batch["weights"] > 0].tolist()
    assert sorted(seen) == list(range(len(lengths)))


def test_batches_hold_texts_of_like_length_and_go_on_where_they_stopped():
    chance = np.random.default_rng(0)
    examples = texts(chance.integers(1, 41, 256).tolist())
    batches = TrainingBatches(examples, batch_size=8, seed=1)
    run = [next(batches) for _ in range(70)]
    padding = np.mean([1 - batch["attention_mask"].mean() for batch in run])
    assert padding < 0.3  # unsorted it is 0.45
    other = TrainingBatches(examples, batch_size=8, seed=1)
    other.set_state({"step": 33})
    assert other.get_state() == {"step": 33}
    for batch in run[33:]:
        assert np.array_equal(next(other)["input_ids"], batch["input_ids"])
    assert not np.array_equal(run[0]["labels"], run[32]["labels"])  # epochs differ
    different = next(TrainingBatches(examples, batch_size=8, seed=2))
    assert not np.array_equal(run[0]["labels"], different["labels"])


@pytest.mark.parametrize(("old", "new"), [(8, 56), (28, 56), (28, 14), (8, 12), (5, 5)])
def test_images_are_resized_as_torch_does(old, new):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pixels = np.random.default_rng(0).integers(0, 256, (3, old, old), np.uint8)
    made = Images(pixels, np.zeros(3, int), 255.0, new).inputs(np.arange(3))["images"]
    grey = torch.from_numpy(pixels.astype(np.float32))[:, None] / 255
    wanted = torch.nn.functional.interpolate(
        grey, (new, new), mode="bilinear", align_corners=False
    ).numpy()[:, 0]
    assert made.shape == (3, new, new, 3)
    np.testing.assert_allclose(made, (wanted[..., None] - MEAN) / DEVIATION, atol=1e-5)
    np.testing.assert_allclose(linear_weights(old, new).sum(1), 1, rtol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files(tmp_path, packed):
    array = np.random.default_rng(0).integers(0, 256, (3, 4, 5), np.uint8)
    file = tmp_path / ("a.gz" if packed else "a")
    file.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    assert np.array_equal(finetune_data.read_idx(file), array)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a", b"", "is not an IDX file of bytes"),
        ("a", b"\0\0\x0d\1\0\0\0\1" + bytes(4), "is not an IDX file of bytes"),  # of floats
        ("a", idx(np.zeros((2, 3)))[:-1], r"\(2, 3\) bytes, but 5 follow"),
        ("a", idx(np.zeros((2, 3))) + b"x", "but 7 follow"),
        ("a", b"\0\0\x08\3\0\0\0\1", "damaged"),
        ("a.gz", idx(np.zeros((2, 3))), "damaged"),
        ("a.gz", gzip.compress(idx(np.zeros((2, 3))), mtime=0)[:-9], "damaged"),
    ],
)
def test_what_is_no_idx_file_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        finetune_data.read_idx(tmp_path / name)


def test_fashion_mnist_whose_labels_do_not_fit(tmp_path):
    for split, count in (("train", 4), ("t10k", 3)):
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(idx(np.zeros((count, 2, 2))))
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(idx(np.zeros(4)))
    with pytest.raises(
        ValueError, match=r"labels of t10k do not match, got shapes \(3, 2, 2\) and \(4,\)"
    ):
        finetune_data.fashion_data(tmp_path, 2, None, None)


def test_fashion_mnist_itself():
    if not FASHION.is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    data = finetune_data.fashion_data(FASHION, 56, None, 500)
    assert (len(data.train), len(data.test), data.num_classes) == (60000, 500, 10)
    assert round(float(data.train.pixels.mean()), 2) == 72.94  # as published
    assert np.bincount(data.train.labels).tolist() == [6000] * 10


def test_digits_are_split_without_overlap_always_alike():
    try:
        assets.package_folder("sklearn")
    except assets.MissingAssetError:
        pytest.skip("scikit-learn is not installed")
    data = finetune_data.digits_data(28, None, 500)
    assert (len(data.train), len(data.test), data.num_classes) == (1297, 500, 10)
    assert np.bincount(np.concatenate([data.train.labels, data.test.labels])).tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180,
    ]  # fmt: skip
    assert data.test.pixels.max() == 16
    fewer = finetune_data.digits_data(28, 100, 500)
    assert np.array_equal(fewer.test.pixels, data.test.pixels)
    assert np.array_equal(fewer.train.pixels, data.train.pixels[:100])
    with pytest.raises(ValueError, match=r"digits\.train must be at most 1297, .* got 1298"):
        finetune_data.digits_data(28, 1298, 500)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    def missing(name):
        raise assets.MissingAssetError(name)

    monkeypatch.setattr(finetune_data, "package_folder", missing)
    with pytest.raises(ImportError, match=r"pip install scikit-learn"):
        finetune_data.digits_data(28, None, None)
