import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effscale.curriculum.pools import Difficulty
from effscale.curriculum.ranking import rank
from effscale.data.megatron import CorruptIndexedDataError
from effscale.interop.deepspeed.difficulty_index import (
    metric_from_deepspeed,
    ranking_from_deepspeed,
)
from effscale.training import LinearPacing

CODES = {"u1": 1, "<i2": 3, "<i4": 4, "<i8": 5, "<u2": 6, "<u4": 7, "<u8": 8}


def write_items(path, items, dtype):
    """What the analyzer's builder leaves: no documents but the boundary 0."""
    lengths = [len(item) for item in items]
    places = np.cumsum([0, *lengths])[:-1] * np.dtype(dtype).itemsize
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, CODES[dtype], len(items), 1)
    index += struct.pack(f"<{len(items)}i", *lengths) + struct.pack(f"<{len(items)}q", *places)
    path.with_suffix(".idx").write_bytes(index + struct.pack("<q", 0))
    path.with_suffix(".bin").write_bytes(b"".join(np.array(x, dtype).tobytes() for x in items))
    return path


def analyze(folder, values, id_type="<u4", value_type="<i2", shuffled=None):
    """The files of one metric, from their description: samples grouped by value, values rising."""
    groups = {value: [] for value in sorted(set(values))}
    for sample, value in enumerate(values):
        groups[value].append(sample)
    if shuffled is not None:
        for group in groups.values():
            shuffled.shuffle(group)
    width = max(1, len(groups) // 100)
    merged, rows = [], list(groups.values())
    for start in range(0, len(rows), width):
        merged.append([sample for row in rows[start : start + width] for sample in row])
    names = ("index_to_sample", "index_to_metric", "sample_to_metric", "merged")
    items = (rows, [[value] for value in groups], [[value] for value in values], merged)
    types = (id_type, value_type, value_type, id_type)
    paths = [folder / name for name in names]
    for path, item, dtype in zip(paths, items, types, strict=True):
        write_items(path, item, dtype)
    return paths


@given(
    values=st.lists(st.integers(0, 9), min_size=1, max_size=30),
    id_type=st.sampled_from(["u1", "<u2", "<u4", "<i8", "<u8"]),
    value_type=st.sampled_from(["u1", "<i2", "<u8"]),
    seed=st.integers(0, 99),
)
def test_the_ranking_is_that_of_the_values(tmp_path_factory, values, id_type, value_type, seed):
    folder = tmp_path_factory.mktemp("index")
    shuffled = np.random.default_rng(seed)
    samples, metric, by_sample, _ = analyze(folder, values, id_type, value_type, shuffled)
    found = ranking_from_deepspeed(samples, metric)
    expected = sorted((value, sample) for sample, value in enumerate(values))
    assert [*zip(found.values.tolist(), found.samples.tolist(), strict=True)] == expected
    assert metric_from_deepspeed(by_sample).tolist() == values
    again = rank(metric_from_deepspeed(by_sample))
    assert again.samples.tolist() == found.samples.tolist()


@pytest.mark.parametrize("levels", [7, 250])
def test_the_file_merged_by_percentile_gives_the_percentiles(tmp_path, levels):
    values = np.random.default_rng(0).integers(0, levels, 1000).tolist()
    samples, _, _, merged = analyze(tmp_path, values)
    pacing = LinearPacing(min_difficulty=1, max_difficulty=30, total=30, difficulty_step=1)
    for path in (samples, merged):
        ranking = ranking_from_deepspeed(path)
        difficulty = Difficulty(ranking=ranking, pacing=pacing, difficulty_type="percentile")
        ordered = sorted(range(1000), key=lambda sample: (values[sample], sample))
        for percent in (1, 2, 17, 29, 30):
            allowed = ranking.samples[: difficulty.num_allowed(percent)]
            # The analyzer's rule: q = n // P a part, and what remains in the last one.
            count = 1000 if percent == 30 else 1000 // 30 * percent
            assert sorted(allowed.tolist()) == sorted(ordered[:count])


def test_counts_of_tokens(tmp_path):
    path = write_items(tmp_path / "vocab_metric_value", [[5, 0, 2**40]], "<i8")
    assert metric_from_deepspeed(path).tolist() == [5, 0, 2**40]


@pytest.mark.parametrize(
    ("rows", "metric", "message"),
    [
        ([[0, 2], [1]], [[4]], r"index_to_metric\.idx.*items: expected one value for each of 2"),
        ([[0, 2], [1]], [[4, 5], [6]], r"index_to_metric\.idx.*items.*found 3 values in 2 items"),
        ([[0, 2], [1]], [[5], [5]], r"index_to_metric\.bin.*values: expected increasing"),
        ([[0, 2], [1]], [[6], [5]], r"index_to_metric\.bin.*values: expected increasing"),
        ([[0, 2], [2]], [[5], [6]], r"index_to_sample\.bin.*ids: expected each sample once"),
        ([[0, 2], [3]], [[5], [6]], r"index_to_sample\.bin.*from 0 to 3"),
        ([], [], r"index_to_sample\.bin.*ids.*0 samples"),
    ],
)
def test_indexes_that_cannot_be(tmp_path, rows, metric, message):
    samples = write_items(tmp_path / "index_to_sample", rows, "<u4")
    metrics = write_items(tmp_path / "index_to_metric", metric, "u1")
    with pytest.raises(CorruptIndexedDataError, match=message):
        ranking_from_deepspeed(samples, metrics)


@given(
    name=st.sampled_from(["index_to_sample", "index_to_metric"]),
    suffix=st.sampled_from([".idx", ".bin"]),
    cut=st.booleans(),
    at=st.integers(0, 200),
    bits=st.integers(1, 255),
)
def test_damage_is_an_error_or_changes_nothing(tmp_path_factory, name, suffix, cut, at, bits):
    folder = tmp_path_factory.mktemp("index")
    samples, metric, _, _ = analyze(folder, [3, 1, 3, 2, 0, 1])
    expected = ranking_from_deepspeed(samples, metric)
    path = (folder / name).with_suffix(suffix)
    whole = path.read_bytes()
    if cut:
        path.write_bytes(whole[: at % len(whole)])
    else:  # a byte of the header, or of the lengths and places
        at %= len(whole) - 8 if suffix == ".idx" else 1
        path.write_bytes(whole[:at] + bytes([whole[at] ^ bits]) + whole[at + 1 :])
    try:
        found = ranking_from_deepspeed(samples, metric)
    except CorruptIndexedDataError as error:
        message = str(error)
    else:
        message = None
        assert found.samples.tolist() == expected.samples.tolist()
        # A flipped value may still rise: what no size and no order tells is not found.
        assert suffix == ".bin" or found.values.tolist() == expected.values.tolist()
    assert message is None or str(folder / name) in message
    assert message is not None or not cut
