"""Opening an index: the right corpus, whole files, and what is said otherwise."""

import json
import re

import numpy as np
import pytest

from effscale.curriculum.analysis.analyze import analyze
from effscale.curriculum.digests import fingerprint, metric_digest
from effscale.curriculum.index import CorruptIndexError, DifficultyIndex, write_manifest
from effscale.curriculum.metrics import LengthThenRarity, VocabularyRarity, sequence_length
from effscale.curriculum.ranking import Ranking
from effscale.data import PackedTokens, TokenStore
from effscale.data.writer import TokenStoreWriter


def make_rows(folder, seed=0, **options):
    if not folder.exists():
        with TokenStoreWriter(folder, vocab_size=50) as writer:
            writer.add_document(np.random.default_rng(seed).integers(0, 50, 200))
    return PackedTokens(TokenStore.open(folder), 16, **options)


@pytest.fixture
def rows(tmp_path):
    return make_rows(tmp_path / "store")


@pytest.fixture
def index(rows, tmp_path):
    metrics = {"rarity": VocabularyRarity(np.arange(50)), "length": sequence_length}
    return analyze(rows, metrics, tmp_path / "index")


def test_an_index_is_read_as_it_was_written(index, rows):
    again = DifficultyIndex.open(index.folder, verify="full")
    assert again.metrics == ("rarity", "length")
    assert again.num_samples == len(rows) == 12
    ranking = again.ranking("rarity", source=rows)
    assert isinstance(ranking, Ranking)
    expected = VocabularyRarity(np.arange(50))
    values = [int(expected({k: v[None] for k, v in rows[i].items()})[0]) for i in range(12)]
    assert again.values("rarity").tolist() == values
    assert ranking.values.tolist() == sorted(values)
    assert again.percentiles("rarity")[0] == min(values)
    assert again.percentiles("rarity")[50] == sorted(values)[5]
    assert again.percentiles("rarity")[100] == max(values)
    assert again.percentiles("length") == dict.fromkeys(range(0, 101, 5), 16)
    assert "rarity" in repr(again)


def test_an_index_of_another_corpus_is_refused_and_both_are_named(index, rows, tmp_path):
    others = {
        "store": make_rows(tmp_path / "other", seed=1),
        "segments": make_rows(tmp_path / "store", cross_document=True),
        "remainder": make_rows(tmp_path / "store", drop_remainder=False),
        "length": PackedTokens(rows.store, 8),
        "list": [rows[i] for i in range(len(rows))],
    }
    for source in others.values():
        with pytest.raises(ValueError, match=r"was built for 12 samples") as caught:
            index.ranking("rarity", source=source)
        assert index.fingerprint in str(caught.value)
        assert fingerprint(source) in str(caught.value)
    found = [fingerprint(source) for source in others.values()]
    assert len({index.fingerprint, *found}) == 6


def test_fingerprints_of_rows_see_length_values_types_and_names():
    base = [{"x": np.arange(3), "y": np.float32(i)} for i in range(200)]
    assert fingerprint(base) == fingerprint([dict(reversed(row.items())) for row in base])
    changed = {
        "shorter": base[:-1],
        "first": [{**base[0], "y": np.float32(9)}, *base[1:]],
        "last": [*base[:-1], {**base[-1], "x": np.array([0, 1, 3])}],
        "type": [{**row, "y": np.float64(row["y"])} for row in base],
        "name": [{"x": row["x"], "z": row["y"]} for row in base],
        "order": base[::-1],
    }
    assert len({fingerprint(base), *map(fingerprint, changed.values())}) == 7


def test_digests_tell_metrics_apart():
    counts = np.arange(1, 9)
    metrics = [
        sequence_length,
        VocabularyRarity(counts),
        VocabularyRarity(counts[::-1].copy()),
        LengthThenRarity(counts, 8),
        LengthThenRarity(counts, 9),
        fingerprint,
    ]
    digests = [metric_digest(metric) for metric in metrics]
    assert None not in digests
    assert len(set(digests)) == len(metrics)
    assert digests == [metric_digest(metric) for metric in metrics]
    assert metric_digest(lambda batch: 0) is None


def test_an_unknown_metric_is_answered_with_the_near_names(index):
    for call in (index.ranking, index.values, index.percentiles):
        with pytest.raises(ValueError, match=r"got 'rarety'.*did you mean 'rarity'\?"):
            call("rarety")


def test_what_is_missing_or_damaged_is_named(index):
    folder = index.folder
    with pytest.raises(FileNotFoundError, match="Build one with analyze"):
        DifficultyIndex.open(folder / "nowhere")

    for name in ("rarity.parquet", "rarity.samples.npy", "rarity.values.npy"):
        path = folder / name
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[30] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CorruptIndexError, match=rf"{re.escape(name)}.*blake2b"):
            DifficultyIndex.open(folder, verify="full")
        path.write_bytes(content[:-1])
        with pytest.raises(
            CorruptIndexError, match=rf"{re.escape(name)}.*bytes {len(content)}, found"
        ):
            DifficultyIndex.open(folder)
        path.unlink()
        with pytest.raises(CorruptIndexError, match=rf"{re.escape(name)}.*no file") as caught:
            DifficultyIndex.open(folder)
        assert caught.value.file == path
        path.write_bytes(content)
    assert DifficultyIndex.open(folder).ranking("rarity").samples.size == 12

    path = folder / "index.json"
    text = path.read_text()
    for wrong, message in [
        (text.replace('"num_samples": 12', '"num_samples": 13'), "digest"),
        (text[:-20], "JSON"),
        ("[]", "format"),
        (text.replace("effscale-difficulty-index", "another"), "format"),
    ]:
        path.write_text(wrong)
        with pytest.raises(CorruptIndexError, match=message):
            DifficultyIndex.open(folder)
    path.write_text(text.replace('"version": 2', '"version": 1'))
    with pytest.raises(ValueError, match=r"version 1.*overwrite=True"):
        DifficultyIndex.open(folder)
    path.unlink()
    with pytest.raises(CorruptIndexError, match="no file"):
        DifficultyIndex.open(folder)


def test_no_flipped_bit_of_a_ranking_is_trained_on(index):
    """Not even after the index was opened."""
    for name in ("length.samples.npy", "length.values.npy"):
        path = index.folder / name
        content = path.read_bytes()
        for byte in range(len(content)):
            damaged = bytearray(content)
            damaged[byte] ^= 1 << byte % 8
            path.write_bytes(damaged)
            with pytest.raises(CorruptIndexError, match=re.escape(name)):
                index.ranking("length")
        path.write_bytes(content)
    assert index.ranking("length").values.tolist() == [16] * 12


def test_a_file_with_fewer_rows_than_samples_is_refused(index):
    content = {key: index.manifest[key] for key in ("num_samples", "source", "metrics")}
    write_manifest(index.folder, {**content, "num_samples": 13})
    assert json.loads((index.folder / "index.json").read_text())["num_samples"] == 13
    with pytest.raises(CorruptIndexError, match="13 rows"):
        DifficultyIndex.open(index.folder).ranking("length")
