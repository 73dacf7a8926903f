"""The analysis against a slow NumPy version, whatever the workers; and what happens when things go wrong."""

import contextlib
import errno
import functools
import json
import os
import pathlib
import struct
import subprocess
import sys

import grain
import hypothesis
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from effscale.curriculum.analysis.analyze import accumulate, analyze, count_vocabulary
from effscale.curriculum.analysis.map import Shard, map_metrics, plan_shards
from effscale.curriculum.analysis.reduce import sort_metric
from effscale.curriculum.analysis.rows import read_rows
from effscale.curriculum.analysis.shards import MARKER, ShardFolder, claimed
from effscale.curriculum.index import DifficultyIndex
from effscale.curriculum.metrics import (
    LengthThenRarity,
    TokenCounts,
    VocabularyRarity,
    sequence_length,
)
from effscale.curriculum.ranking import check_ranking
from effscale.data import DiskFullError, MegatronTokens, PackedTokens, TokenStore
from effscale.data.writer import TokenStoreWriter


@pytest.fixture(scope="module")
def parts():
    """The helpers as a module that worker processes can import: they get this process's path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(pathlib.Path(__file__).parent))
        import analysis_parts

        yield analysis_parts


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "store", [3, 50, 1, 7, 120, 64, 2])


def make_store(folder, lengths, vocab_size=40):
    rng = np.random.default_rng(len(lengths))
    with TokenStoreWriter(folder, vocab_size=vocab_size) as writer:
        for length in lengths:
            writer.add_document(rng.integers(0, vocab_size, length))
    return TokenStore.open(folder)


def slow_ranking(values):
    """Sorted by value, then by id."""
    order = sorted(range(len(values)), key=lambda sample: (values[sample], sample))
    return order, [values[sample] for sample in order]


def check_index(index, values, metric="token"):
    """Everything an index says, against lists."""
    order, ordered = slow_ranking(values)
    ranking = index.ranking(metric)
    check_ranking(ranking)
    assert ranking.samples.tolist() == order
    assert ranking.values.tolist() == ordered
    assert index.values(metric).tolist() == values
    for percent, value in index.percentiles(metric).items():
        # The smallest value that at least so many percent of the samples do not exceed.
        enough = [
            v for v in ordered if 100 * sum(w <= v for w in ordered) >= percent * len(ordered)
        ]
        assert value == enough[0], percent


# Sizes that divide the samples and that do not, one shard and many, in this process and in three.
SIZES = [
    {},
    {"batch_size": 7, "shard_size": 1000},
    {"batch_size": 5000, "shard_size": 2999, "num_workers": 3},
    {"batch_size": 64, "shard_size": 100_000, "num_workers": 1},
]


def test_the_index_is_the_same_for_any_workers_shards_and_batches(parts, tmp_path):
    count = 12_345
    indexes = [
        analyze(parts.Remainders(count), {"token": parts.token}, tmp_path / str(number), **sizes)
        for number, sizes in enumerate(SIZES)
    ]
    values = [(sample + 7) % 10_000 for sample in range(count)]
    order = np.lexsort((np.arange(count), values))
    for index in indexes:
        samples, ordered = index.ranking("token")
        np.testing.assert_array_equal(samples, order)
        np.testing.assert_array_equal(ordered, np.asarray(values)[order])
        np.testing.assert_array_equal(index.values("token"), values)
        expected = np.percentile(values, range(0, 101, 5), method="inverted_cdf")
        assert list(index.percentiles("token").values()) == expected.tolist()
        # To the byte: the manifest holds the digest of the file.
        assert index.manifest == indexes[0].manifest
    # Nothing is left beside the indexes.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3"]


@hypothesis.given(
    st.lists(st.integers(-5, 5) | st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=60),
    st.integers(1, 20),
    st.integers(1, 20),
)
def test_the_index_of_any_integers(tmp_path_factory, values, batch_size, shard_size):
    source = [{"value": np.int64(value)} for value in values]
    index = analyze(
        source,
        {"token": lambda batch: batch["value"]},
        tmp_path_factory.mktemp("any") / "index",
        batch_size=batch_size,
        shard_size=shard_size,
    )
    check_index(index, values)


def test_floating_values_are_kept_and_both_zeros_are_one_value(tmp_path):
    values = [0.5, -0.0, 1e-300, 0.0, -2.25, -0.0, 3.0]
    source = [{"value": np.float64(value)} for value in values]
    index = analyze(source, {"token": lambda batch: batch["value"]}, tmp_path / "index")
    check_index(index, values)
    assert index.manifest["metrics"]["token"]["dtype"] == "float64"


def test_several_metrics_in_one_pass(store, tmp_path):
    rows = PackedTokens(store, 16, drop_remainder=False)
    counts = count_vocabulary(rows, 40)
    metrics = {"rarity": VocabularyRarity(counts), "length": sequence_length}
    index = analyze(rows, metrics, tmp_path / "index", batch_size=4)
    assert index.metrics == ("rarity", "length")
    lengths = [int((rows[i]["segment_ids"] > 0).sum()) for i in range(len(rows))]
    assert min(lengths) < 16  # the padded last row
    check_index(index, lengths, "length")
    rarity = []
    for i, length in enumerate(lengths):
        tokens = [*rows[i]["input_ids"][:length], rows[i]["labels"][length - 1]]
        p = np.maximum(counts, 1) / np.maximum(counts, 1).sum()
        rarity.append(int(sum(-np.log(p[token]) for token in tokens)))
    check_index(index, rarity, "rarity")


@hypothesis.given(
    st.lists(st.integers(1, 30), min_size=1, max_size=12),
    st.integers(1, 12),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_packed_rows_read_at_once_are_those_read_one_by_one(
    tmp_path_factory, lengths, length, cross_document, drop_remainder, data
):
    store = make_store(tmp_path_factory.mktemp("packed") / "store", lengths)
    options = {
        "cross_document": cross_document,
        "drop_remainder": drop_remainder,
        "pad_token_id": 5,
    }
    rows = PackedTokens(store, length, **options)
    if not len(rows):
        return
    start = data.draw(st.integers(0, len(rows) - 1))
    stop = data.draw(st.integers(start + 1, len(rows)))
    for first, last in [(0, len(rows)), (start, stop)]:
        batch = read_rows(rows, first, last)
        for key in rows[0]:
            expected = np.stack([rows[index][key] for index in range(first, last)])
            np.testing.assert_array_equal(batch[key], expected, err_msg=key)
            assert batch[key].dtype == expected.dtype


def test_rows_of_a_megatron_corpus_are_read_at_once_too(tmp_path):
    ids = np.arange(20, dtype="<u2")
    (tmp_path / "corpus.bin").write_bytes(ids.tobytes())
    header = struct.pack("<9sQBQQ", b"MMIDIDX", 1, 8, 2, 3)
    (tmp_path / "corpus.idx").write_bytes(header + struct.pack("<2i2q3q", 13, 7, 0, 26, 0, 1, 2))
    rows = PackedTokens(MegatronTokens.open(tmp_path / "corpus", vocab_size=20), 6)
    batch = read_rows(rows, 0, 3)
    for key in rows[0]:
        np.testing.assert_array_equal(
            batch[key], np.stack([rows[index][key] for index in range(3)])
        )


def test_a_grain_data_set_and_a_list_are_sources_too(store, tmp_path):
    rows = PackedTokens(store, 16)
    metrics = {"rarity": VocabularyRarity(count_vocabulary(rows, 40))}
    expected = analyze(rows, metrics, tmp_path / "packed").values("rarity")
    dataset = grain.MapDataset.source(rows)
    for name, source in {"grain": dataset, "list": [rows[i] for i in range(len(rows))]}.items():
        found = analyze(source, metrics, tmp_path / name, batch_size=3).values("rarity")
        np.testing.assert_array_equal(found, expected)
    # Shuffled with a fixed seed it is another source, with its own positions.
    shuffled = dataset.shuffle(seed=3)
    found = analyze(shuffled, metrics, tmp_path / "shuffled").values("rarity")
    assert found.tolist() != expected.tolist()
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_rows_of_unequal_length_count_their_own_tokens_in_any_batch(tmp_path, batch_size):
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 9, length) for length in (4, 4, 1, 9, 4, 2)]
    source = [{"input_ids": text[:-1], "labels": text[1:]} for text in texts if len(text) > 1]
    texts = [text for text in texts if len(text) > 1]
    counts = count_vocabulary(source, 9, batch_size=batch_size)
    assert counts.tolist() == np.bincount(np.concatenate(texts), minlength=9).tolist()
    metrics = {"token": VocabularyRarity(counts), "length": sequence_length}
    index = analyze(source, metrics, tmp_path / "index", batch_size=batch_size)
    p = np.maximum(counts, 1) / np.maximum(counts, 1).sum()
    check_index(index, [int(sum(-np.log(p[k]) for k in text)) for text in texts])
    check_index(index, [len(text) - 1 for text in texts], "length")
    # Padding carries no label, so a loss does not count it.
    assert read_rows(source, 0, 3)["labels"][0, -1] == -100


@pytest.mark.parametrize("first", [2**24, 2**33])
def test_ids_are_exact_where_float32_and_int32_are_not(parts, tmp_path, first):
    source, work = parts.ManyRows(2**34), ShardFolder(tmp_path, {"metrics": {"m": "1"}})
    shards = [Shard(0, first - 64, first), Shard(1, first, first + 64)]
    for shard in shards:
        work.write(shard, map_metrics(source, {"m": parts.token}, 10, shard))
    paths = [work.path(shard) for shard in shards]
    options = {
        "num_samples": 128,
        "spill": tmp_path / "spill",
        "num_threads": 1,
        "memory_limit": "1GB",
    }
    sort_metric(paths, "m", tmp_path / "m.sorted", **options)
    samples = range(shards[0].start, shards[-1].stop)
    expected, _ = slow_ranking([sample % 3 for sample in samples])
    found = pq.read_table(tmp_path / "m.sorted")["sample"].to_pylist()
    assert found == [samples[place] for place in expected]


def test_values_that_do_not_fit_into_memory_are_sorted_on_disk(tmp_path):
    rng = np.random.default_rng(0)
    work, count = ShardFolder(tmp_path, {"metrics": {"m": "1"}}), 2_000_000
    values = rng.integers(0, 1000, count)
    shards = plan_shards(count, 500_000)
    for shard in shards:
        samples = np.arange(shard.start, shard.stop)
        work.write(shard, {"sample": samples, "m": values[samples]})
    paths = [work.path(shard) for shard in shards]
    options = {"num_samples": count, "spill": tmp_path / "spill", "num_threads": 2}
    # 32 MB of values and ids, sorted in less.
    sort_metric(paths, "m", tmp_path / "m.sorted", memory_limit="28MB", **options)
    table = pq.read_table(tmp_path / "m.sorted")
    order = np.argsort(values, kind="stable")
    np.testing.assert_array_equal(table["sample"].to_numpy(), order)
    np.testing.assert_array_equal(table["value"].to_numpy(), values[order])


def test_the_shard_of_a_killed_worker_is_mapped_again(parts, tmp_path):
    (tmp_path / "deaths").mkdir()
    killer = parts.Killer(tmp_path / "deaths", sample=150, times=2)
    index = analyze(
        parts.Remainders(400),
        {"token": killer},
        tmp_path / "index",
        num_workers=2,
        batch_size=10,
        shard_size=50,
    )
    assert len(list((tmp_path / "deaths").iterdir())) == 2
    check_index(index, [sample + 7 for sample in range(400)])


def test_a_shard_that_always_kills_its_worker_is_named_and_the_others_are_kept(parts, tmp_path):
    (tmp_path / "deaths").mkdir()
    # The token 10 is that of sample 3, in the first of four shards.
    always = parts.Killer(tmp_path / "deaths", sample=10, times=100)
    run = functools.partial(
        analyze, parts.Remainders(200), {"token": always}, tmp_path / "index", shard_size=50
    )
    with pytest.raises(RuntimeError, match=r"shard 0 \(samples 0 to 49\).*killed 3 times"):
        run(num_workers=2)
    with pytest.raises(FileNotFoundError, match="unfinished analysis"):
        DifficultyIndex.open(tmp_path / "index")
    assert {"00001.parquet", "00002.parquet", "00003.parquet"} == {
        path.name for path in (tmp_path / ".index.analysis").glob("*.parquet")
    }


class Counting:
    """A source of which one row cannot be read, and that remembers which were."""

    def __init__(self, broken=None):
        self.broken, self.read = broken, set()

    def __len__(self):
        return 100

    def __getitem__(self, index):
        self.read.add(index)
        if index == self.broken:
            raise OSError("the disk is gone")
        return {"input_ids": np.array([index % 9])}


def test_finished_shards_are_kept_and_damaged_or_foreign_ones_are_not(parts, tmp_path, monkeypatch):
    # So that the fingerprint does not read the rows that are counted.
    monkeypatch.setattr(sys.modules["effscale.curriculum.digests"], "SAMPLED_ROWS", 1)
    folder, metrics = tmp_path / "index", {"token": parts.token}
    run = functools.partial(analyze, folder=folder, shard_size=10, batch_size=5)
    with pytest.raises(OSError, match="the disk is gone"):
        run(Counting(broken=55), metrics)
    shards = sorted((tmp_path / ".index.analysis").glob("*.parquet"))
    assert [path.name for path in shards] == [f"{shard:05d}.parquet" for shard in range(5)]
    # One is damaged in the middle, one cut off.
    content = bytearray(shards[1].read_bytes())
    content[20] ^= 1
    shards[1].write_bytes(content)
    shards[3].write_bytes(shards[3].read_bytes()[:-7])
    source, seen = Counting(), []
    index = run(source, metrics, progress=seen.append)
    assert source.read - {0} == {*range(10, 20), *range(30, 40), *range(50, 100)}
    assert [done.samples for done in seen] == [40, 50, 60, 70, 80, 90, 100]
    check_index(index, [sample % 9 for sample in range(100)])

    # Shards of another metric, or of other counts, are no help.
    for first, second in [
        ({"token": parts.token}, {"other": parts.token}),
        (
            {"token": VocabularyRarity(np.arange(9))},
            {"token": VocabularyRarity(np.arange(9)[::-1].copy())},
        ),
    ]:
        with pytest.raises(OSError, match="the disk is gone"):
            run(Counting(broken=55), first, overwrite=True)
        source = Counting()
        run(source, second, overwrite=True)
        assert source.read == set(range(100))


def test_what_is_beside_an_index_stays(parts, tmp_path):
    run = functools.partial(analyze, parts.Remainders(9), {"token": parts.token}, shard_size=4)
    mine = [tmp_path / "train.shards", tmp_path / ".train.analysis"]
    for folder in mine:
        folder.mkdir()
        (folder / "00000.parquet").write_text("mine")
    with pytest.raises(FileExistsError, match=r"\.train\.analysis: .*something else"):
        run(tmp_path / "train")
    for folder in mine:
        assert (folder / "00000.parquet").read_text() == "mine"
    (tmp_path / ".other.analysis").write_text("a file")
    with pytest.raises(FileExistsError, match="something else"):
        run(tmp_path / "other")
    # A folder of ours without its files, as after a crash at once, is taken.
    (tmp_path / ".third.analysis").mkdir()
    assert run(tmp_path / "third").num_samples == 9
    assert not (tmp_path / ".third.analysis").exists()


def test_shards_that_a_crash_left_beside_a_finished_index_are_removed(parts, tmp_path, monkeypatch):
    # So that the fingerprint does not read the broken row.
    monkeypatch.setattr(sys.modules["effscale.curriculum.digests"], "SAMPLED_ROWS", 1)
    source, metrics, folder = parts.Remainders(9), {"token": parts.token}, tmp_path / "index"
    with monkeypatch.context() as patch:
        # Killed between the two; nothing is written or removed from then on.
        patch.setattr(ShardFolder, "remove", lambda self: None)
        analyze(source, metrics, folder)
    assert (tmp_path / ".index.analysis" / "00000.parquet").exists()
    # Shards of another analysis are none of this index, and stay.
    with pytest.raises(OSError, match="the disk is gone"):
        analyze(Counting(broken=55), metrics, folder, shard_size=10, overwrite=True)
    analyze(source, metrics, folder)
    assert len(list((tmp_path / ".index.analysis").glob("*.parquet"))) == 5
    analyze(Counting(), metrics, folder, shard_size=10, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(ShardFolder, "remove", lambda self: None)
        analyze(source, metrics, folder, overwrite=True)
    analyze(source, metrics, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_second_process_is_refused_and_that_of_a_dead_one_is_taken_up(parts, tmp_path):
    run = functools.partial(analyze, parts.Remainders(9), {"token": parts.token})
    with claimed(tmp_path / ".index.analysis", {"metrics": {}}):
        # A lock of another open file is one to this process too.
        with pytest.raises(RuntimeError, match=rf"another process \(pid {os.getpid()} on "):
            run(tmp_path / "index")
        assert (tmp_path / ".index.analysis" / MARKER).exists()
    assert run(tmp_path / "index").num_samples == 9
    # One that is killed while it has the folder.
    script = (
        "import fcntl, os, pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[1]); folder.mkdir()\n"
        "fcntl.flock(os.open(folder / sys.argv[2], os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX)\n"
        "print('locked', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / ".second.analysis"), MARKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(RuntimeError, match="another process"):
            run(tmp_path / "second")
        process.kill()
    assert run(tmp_path / "second").num_samples == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "second"]


def test_a_full_disk_is_named_and_finished_shards_are_kept(parts, tmp_path, monkeypatch):
    import duckdb

    run = functools.partial(
        analyze, parts.Remainders(9), {"token": parts.token}, tmp_path / "index", shard_size=3
    )
    shards = tmp_path / ".index.analysis"
    write = pq.write_table
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write_two(table, path, **options):
        write(table, path, **options)
        if "00002" in path.name:
            raise full

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", write_two)
        with pytest.raises(DiskFullError, match=r"the disk is full.*00002\.parquet"):
            run()
    assert sorted(path.name for path in shards.iterdir()) == [
        "00000.parquet",
        "00001.parquet",
        MARKER,
    ]
    for error in [
        full,
        duckdb.IOException('Could not write file "x": No space left on device'),
        duckdb.OutOfMemoryException("set by the 'max_temp_directory_size' setting"),
    ]:

        def sort(*arguments, error=error, **options):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["effscale.curriculum.analysis.analyze"], "sort_metric", sort)
            with pytest.raises(DiskFullError, match="the disk is full"):
                run()
        assert len(list(shards.glob("*.parquet"))) == 3
    assert run().num_samples == 9
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_nothing_is_left_of_an_analysis_that_finished_no_shard(parts, tmp_path):
    with contextlib.suppress(ValueError):
        analyze(parts.Remainders(9), {"m": lambda batch: 3}, tmp_path / "index")
    assert not list(tmp_path.iterdir())


def test_an_index_of_a_metric_without_a_digest_is_not_taken_for_another(parts, tmp_path):
    run = functools.partial(analyze, parts.Remainders(9), folder=tmp_path / "index")
    metrics = {"m": lambda batch: batch["input_ids"][:, 0]}
    run(metrics)
    with pytest.raises(
        FileExistsError, match=r"it is unknown whether .*'m' has no digest.*lambdas"
    ):
        run(metrics)
    metrics["m"].digest = "first token"
    assert run(metrics, overwrite=True).num_samples == run(metrics).num_samples == 9


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            lambda batch: np.where(batch["x"] == 13, np.nan, 1.0),
            "metric 'm' of sample 13 must be a finite number, got nan",
        ),
        (
            lambda batch: np.where(batch["x"] == 13, -np.inf, 1.0),
            "metric 'm' of sample 13 must be a finite number, got -inf",
        ),
        (
            lambda batch: batch["x"][:, None],
            r"metric 'm' of samples 0 to 9 must have shape \(10,\).*got \(10, 1\)",
        ),
        (lambda batch: 3, r"metric 'm' of samples 0 to 9 must have shape \(10,\).*got \(\)"),
        (lambda batch: batch["x"][1:], r"must have shape \(10,\).*got \(9,\)"),
        (
            lambda batch: [str(x) for x in batch["x"]],
            "'m' of samples 0 to 9 must have integers .*got type <U",
        ),
        (lambda batch: batch["x"] * 1j, "got type complex128"),
        (lambda batch: [None] * 10, "got type object"),
        (lambda batch: batch["x"].astype(np.uint64) + np.uint64(2**63), "below 2\\*\\*63"),
        (
            lambda batch: batch["x"] + (0.5 if batch["x"][0] else 0),
            "'m' must return either integers or floating-point numbers",
        ),
    ],
)
@pytest.mark.parametrize("shard_size", [10, 40])
def test_values_that_are_no_numbers_are_refused_by_name(tmp_path, values, message, shard_size):
    source = [{"x": np.int64(index)} for index in range(40)]
    sizes = {"batch_size": 10, "shard_size": shard_size}
    with pytest.raises(ValueError, match=message):
        analyze(source, {"m": values}, tmp_path / "index", **sizes)
    assert not (tmp_path / "index").exists()


def test_an_error_in_a_metric_says_which_and_where(parts, tmp_path):
    metrics = {"rarity": VocabularyRarity(np.ones(20, np.int64))}
    for num_workers in (0, 1):
        with pytest.raises(ValueError, match="token 20 in row 3") as caught:
            analyze(
                parts.Remainders(30),
                metrics,
                tmp_path / "index",
                batch_size=10,
                num_workers=num_workers,
            )
        assert "In metric 'rarity' on samples 10 to 19." in caught.value.__notes__


def test_impossible_arguments_are_refused(parts, store, tmp_path):
    source, metrics, folder = parts.Remainders(5), {"token": parts.token}, tmp_path / "index"
    refused = [
        (lambda: analyze([], metrics, folder), "no samples"),
        (lambda: analyze(source, {}, folder), "at least one metric"),
        (lambda: analyze(source, {"a/b": parts.token}, folder), "'a/b'"),
        (lambda: analyze(source, {"": parts.token}, folder), "got ''"),
        (lambda: analyze(source, {"Sample": parts.token}, folder), "twice"),
        (lambda: analyze(source, {"a": parts.token, "A": parts.token}, folder), "'A' twice"),
        (
            lambda: analyze(source, metrics, folder, batch_size=0),
            "batch_size must be at least 1, got 0",
        ),
        (
            lambda: analyze(source, metrics, folder, shard_size=0),
            "shard_size must be at least 1, got 0",
        ),
        (
            lambda: analyze(source, metrics, folder, num_workers=-1),
            "num_workers must be at least 0, got -1",
        ),
        (lambda: analyze([1, 2], metrics, folder), "row 0 must be a dict of arrays, got int"),
        (lambda: analyze(store, metrics, folder), "PackedTokens"),
        (
            lambda: analyze([{"a": [object()]}], metrics, folder),
            "field 'a' of row 0 must be a numeric array, got objects",
        ),
        (lambda: accumulate([{"a": 1}, {"b": 1}], parts.token), r"got \['b'\] for row 1"),
        (
            lambda: accumulate([{"a": np.ones((2, 2))}, {"a": np.ones((2, 3))}], parts.token),
            r"shapes of field 'a' .*got \(2, 3\) for row 1",
        ),
        (lambda: accumulate(grain.MapDataset.source([{"a": 1}]).repeat(), parts.token), "endless"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(Exception, match="local object") as caught:
        analyze(source, {"m": lambda batch: 1}, folder, num_workers=1)
    assert "num_workers=0" in caught.value.__notes__[0]


def test_an_index_that_is_there_is_opened_or_must_be_replaced(parts, tmp_path):
    folder, metrics = tmp_path / "index", {"token": parts.token}
    analyze(parts.Remainders(30), metrics, folder)
    seen = []
    again = analyze(parts.Remainders(30), metrics, folder, progress=seen.append)
    assert again.num_samples == 30
    assert not seen
    with pytest.raises(FileExistsError, match="overwrite=True"):
        analyze(parts.Remainders(31), metrics, folder)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        analyze(parts.Remainders(30), {"length": sequence_length}, folder)
    (tmp_path / "something").mkdir()
    with pytest.raises(FileExistsError, match="something"):
        analyze(parts.Remainders(30), metrics, tmp_path / "something")
    assert analyze(parts.Remainders(31), metrics, folder, overwrite=True).num_samples == 31


def test_sums_over_a_corpus_are_exact_for_any_workers(parts, store):
    rows = PackedTokens(store, 16)
    flat = np.concatenate(
        [[*rows[i]["input_ids"], rows[i]["labels"][-1]] for i in range(len(rows))]
    )
    for sizes in ({}, {"batch_size": 2, "shard_size": 3, "num_workers": 2}):
        counts = count_vocabulary(rows, 45, **sizes)
        assert counts.tolist() == np.bincount(flat, minlength=45).tolist()
    whole = count_vocabulary(store, 45)
    assert whole.tolist() == np.bincount(store.tokens, minlength=45).tolist()
    with pytest.raises(ValueError, match=r"vocab_size must be above .*got 10"):
        count_vocabulary(store, 10)
    with pytest.raises(ValueError, match="token"):
        count_vocabulary(rows, 10)


def test_floating_sums_do_not_depend_on_who_is_first():
    source = [{"x": np.float64(value)} for value in np.random.default_rng(0).random(50)]

    def backwards(function, shards):
        return ((shard, function(shard)) for shard in reversed(shards))

    total = functools.partial(accumulate, source, lambda b: b["x"].sum(keepdims=True))
    sizes = {"batch_size": 3, "shard_size": 6}
    assert total(**sizes, run=backwards).tolist() == total(**sizes).tolist()


def test_a_sum_whose_shape_depends_on_the_batch_is_refused(parts):
    for shard_size in (10, 4):
        with pytest.raises(ValueError, match="must not depend on the number of rows"):
            accumulate(parts.Remainders(10), parts.token, batch_size=4, shard_size=shard_size)
    with pytest.raises(ValueError, match="must return finite numbers"):
        accumulate(parts.Remainders(10), lambda batch: [np.nan])


@pytest.mark.parametrize("more", [{}, {"kind": 3}, {"labels": None}])
def test_tokens_of_any_name_and_unequal_length(more):
    """Padding does not count, and neither name nor batch matters."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 9, 1 + i % 5) for i in range(12)]
    extra = lambda ids: {key: ids if value is None else value for key, value in more.items()}
    known = [{"input_ids": ids, **extra(ids)} for ids in texts]
    own = [{"tokens": ids, **extra(ids)} for ids in texts]
    expected = count_vocabulary(known, 9)
    counts = count_vocabulary(own, 9, field="tokens", batch_size=5)
    np.testing.assert_array_equal(counts, expected)
    for batch_size in (4, 12):
        batch = read_rows(own, 0, batch_size)
        lengths = [len(ids) for ids in texts[:batch_size]]
        assert sequence_length(batch, field="tokens").tolist() == lengths
        for known_metric, metric in [
            (VocabularyRarity(counts), VocabularyRarity(counts, field="tokens")),
            (LengthThenRarity(counts, 5), LengthThenRarity(counts, 5, field="tokens")),
        ]:
            wanted = known_metric(read_rows(known, 0, batch_size))
            np.testing.assert_array_equal(metric(batch), wanted)
            assert metric.digest != known_metric.digest
    with pytest.raises(ValueError, match=r"must have 'input_ids', got 'tokens'.*field="):
        VocabularyRarity(counts)(batch)


def test_fields_whose_lengths_disagree_have_no_common_padding():
    rows = [{"question": np.ones(i + 1), "answer": np.ones(3 - i)} for i in range(3)]
    assert read_rows(rows, 0, 3).keys() == {"question", "answer"}


def test_an_unknown_option_of_counting_is_refused(tmp_path):
    with TokenStoreWriter(tmp_path / "store", vocab_size=9) as writer:
        writer.add_document([1, 2])
    with pytest.raises(TypeError, match="nonsense"):
        count_vocabulary(TokenStore.open(tmp_path / "store"), 9, nonsense=1)


def test_the_index_is_documented_parquet(parts, tmp_path):
    analyze(parts.Remainders(30), {"token": parts.token}, tmp_path / "index")
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [
        "index.json",
        "token.parquet",
        "token.samples.npy",
        "token.values.npy",
    ]
    schema = pq.read_schema(tmp_path / "index" / "token.parquet")
    assert [(field.name, str(field.type)) for field in schema] == [
        ("value", "int64"),
        ("sample", "int64"),
    ]
    table = pq.read_table(tmp_path / "index" / "token.parquet")
    for column in table.column_names:
        array = np.load(tmp_path / "index" / f"token.{column}s.npy")
        np.testing.assert_array_equal(array, table[column].to_numpy())
    manifest = json.loads((tmp_path / "index" / "index.json").read_text())
    assert manifest["num_samples"] == 30
    assert manifest["metrics"]["token"]["min"] == 7
    assert manifest["metrics"]["token"]["max"] == 36
    assert len(manifest["metrics"]["token"]["percentiles"]) == 21


def test_counts_need_nothing_but_rows():
    assert TokenCounts(3)({"input_ids": np.array([[2, 0, 2]])}).tolist() == [1, 0, 2]
