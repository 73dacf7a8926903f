"""Cleaning: the measures against slow versions written from their definitions, duplicates that are known, and an account of all that is left out."""

import collections
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effscale.data import TextFiles, prepare_corpus
from effscale.data.cleaning import (
    Cleaned,
    DatasheetEntry,
    NearDuplicates,
    Quality,
    ray_runner,
    write_datasheet,
)
from effscale.data.cleaning.language import identify_language
from effscale.data.cleaning.quality import character_repetition, word_repetition
from effscale.data.documents import SkipReport

PROSE = "The old house at the edge of the wood had been empty for years, and nobody in the village could say who had lived there last."


def slow_character_repetition(text, length):
    """From the description in ROOTS: sort the counts, and take those of the most frequent n-grams."""
    grams = [text[i : i + length] for i in range(len(text) - length + 1)]
    if not grams:
        return 0.0
    counts = sorted(collections.Counter(grams).values(), reverse=True)
    most = min(int(np.sqrt(len(counts))), len([count for count in counts if count > 1]))
    return sum(counts[:most]) / sum(counts)


def slow_word_repetition(text, length):
    words = text.lower().split()
    grams = [" ".join(words[i : i + length]) for i in range(len(words) - length + 1)]
    return sum(grams.count(gram) > 1 for gram in grams) / max(len(grams), 1)


@settings(deadline=None, max_examples=50)
@given(st.text("ab c", max_size=60), st.integers(1, 5))
def test_measures_equal_slow_versions(text, length):
    assert character_repetition(text, length) == pytest.approx(
        slow_character_repetition(text, length)
    )
    assert word_repetition(text, length) == pytest.approx(slow_word_repetition(text, length))


def test_language():
    assert identify_language(PROSE)[0] == "en"
    assert (
        identify_language("La vieille maison au bord du bois était vide depuis des années.")[0]
        == "fr"
    )
    fault = Quality(language="fr").fault(PROSE)
    assert fault is not None
    assert fault[0] == "language"
    assert "'en'" in fault[1]


def test_unknown_language_names_near_ones():
    with pytest.raises(ValueError, match=r"language must be .*got 'fra'.*'fr'"):
        Quality(language="fra")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_word_repetition": 1.5}, r"max_word_repetition must be .*, got 1\.5"),
        ({"min_characters": 0}, r"min_characters must be .*, got 0"),
    ],
)
def test_impossible_bounds(options, named):
    with pytest.raises(ValueError, match=named):
        Quality(**options)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 100))
def test_estimated_similarity(start):
    """MinHash's estimate is within five standard deviations of the share that the sets have in common."""
    near = NearDuplicates(ngram=4, permutations=256)
    words = [f"w{i}" for i in range(400)]
    one, two = (" ".join(words[a:b]) for a, b in ((0, 300), (start, start + 300)))
    sets = [{text[i : i + 4] for i in range(len(text) - 3)} for text in (one, two)]
    true = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    found = float((near.signature(one) == near.signature(two)).mean())
    assert abs(found - true) <= 5 * np.sqrt(true * (1 - true) / 256) + 1e-9


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.95])
def test_the_index_finds_pairs_at_the_threshold(threshold):
    """By the formula of banding: 99 of 100 pairs of just this similarity become candidates."""
    bands, rows = NearDuplicates(threshold=threshold).bands
    assert bands * rows <= 128
    assert 1 - (1 - threshold**rows) ** bands >= 0.99


@pytest.mark.parametrize(
    ("above", "least", "most"), [(-0.07, 0.0, 0.08), (0, 0.4, 0.65), (0.07, 0.92, 1)]
)
def test_what_is_found_around_the_threshold(above, least, most):
    """The estimate decides: half of the pairs at the threshold, and nearly all from two deviations above it."""
    near, random = NearDuplicates(threshold=0.7), np.random.default_rng(0)
    found = 0
    for _ in range(200):
        one, other = random.integers(0, 2**32, (2, near.permutations), np.uint32)
        index = near.index()
        index.add(one)
        found += index.add(
            np.where(random.random(near.permutations) < near.threshold + above, one, other)
        )
    assert least <= found / 200 <= most


def test_a_long_text_has_the_signature_of_all_its_n_grams():
    near, text = NearDuplicates(), " ".join(map(str, range(3000)))
    parts = [near.signature(text[i : i + 4000]) for i in range(0, len(text) - 3992, 3993)]
    rest = near.signature(text[-4000:])
    np.testing.assert_array_equal(np.min([*parts, rest], axis=0), near.signature(text))


def test_on_error_belongs_to_the_source(folder):
    with pytest.raises(ValueError, match=r"on_error must be .*got 'skip'"):
        cleaned(folder, on_error="skip")


@pytest.fixture
def folder(tmp_path):
    texts = {
        "a": PROSE,
        "b": PROSE.upper().replace(" ", "  "),
        "c": PROSE.replace("years", "decades"),
        "d": "ha " * 60,
        "e": "Too short.",
        "f": "A river runs through the valley, and in spring it floods the lower meadows before the grass begins to grow.",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    return tmp_path


def cleaned(folder, **options):
    quality = Quality(min_characters=20)
    source = TextFiles(paths=str(folder / "*.txt"))
    near = NearDuplicates(threshold=0.7, ngram=4)
    return Cleaned(source=source, quality=quality, near_duplicates=near, **options)


def test_what_is_left_out_is_counted(folder):
    report = SkipReport()
    kept = [document.text[:9] for document in cleaned(folder).documents(report)]
    assert kept == ["The old h", "A river r"]
    assert report.counts == {"duplicate": 1, "near_duplicate": 1, "repetitive": 1, "short": 1}


def test_a_corpus_of_it_and_its_datasheet(folder, tmp_path):
    corpus = prepare_corpus(
        cleaned(folder), tmp_path / "cache", vocab_size=300, validation_fraction=0.0
    )
    texts = [document.text for document in cleaned(folder).documents()]
    assert corpus.train.num_documents == 2
    assert corpus.num_bytes == sum(len(text.encode()) for text in texts)
    entry = DatasheetEntry(name="tales", language="en", license="CC0", corpus=corpus)
    page = write_datasheet(tmp_path / "sheet", [entry]).read_text()
    (row,) = json.loads((tmp_path / "sheet" / "datasheet.json").read_text())
    assert row["documents"] == 2
    assert row["bytes"] == corpus.num_bytes
    assert row["left_out"] == {"duplicate": 1, "near_duplicate": 1, "repetitive": 1, "short": 1}
    assert "| tales | en | CC0 | 1.000 | 2 |" in page


def test_a_component_without_a_license_is_refused(folder, tmp_path):
    corpus = prepare_corpus(cleaned(folder), tmp_path, vocab_size=300, validation_fraction=0.0)
    with pytest.raises(
        ValueError, match=r"license must be a nonempty text, got ' '; use 'unknown'"
    ):
        DatasheetEntry(name="tales", language="en", license=" ", corpus=corpus)


def test_other_bounds_are_another_corpus(folder):
    other = Cleaned(source=TextFiles(paths=str(folder / "*.txt")))
    assert cleaned(folder).fingerprint() != other.fingerprint()
    assert cleaned(folder).fingerprint() == cleaned(folder, run=ray_runner).fingerprint()


@pytest.mark.slow  # starting a cluster takes most of it
def test_a_cluster_finds_the_same(folder):
    pytest.importorskip("ray", reason="ray is not installed (extra: ray)")
    program = pathlib.Path(__file__).with_name("ray_cleaning.py")
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, str(program), str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | quiet,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "same as without Ray" in done.stdout
