import logging
import threading

import pytest

from effscale.data import (
    DiskFullError,
    DocumentError,
    JsonLines,
    TextFiles,
    make_dataset,
    prepare_corpus,
    prepare_mixture,
)
from effscale.data import corpus as module


@pytest.fixture
def books(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    for number in range(40):
        text = f"book {number}\n" + "the quick brown fox jumps over the lazy dog\n" * (number + 1)
        (folder / f"{number:02d}.txt").write_text(text)
    return TextFiles(paths=str(folder / "*.txt"), on_error="skip")


def counted(monkeypatch):
    """Counts how often stores are written."""
    calls = []
    write = module.write_splits
    monkeypatch.setattr(module, "write_splits", lambda *a, **k: calls.append(1) or write(*a, **k))
    return calls


def test_prepares_once_and_reopens(books, tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    seen = []
    first = prepare_corpus(
        books, tmp_path / "cache", vocab_size=300, validation_fraction=0.2, progress=seen.append
    )
    assert first.train.num_documents + first.validation.num_documents == 40
    assert 0 < first.validation.num_documents < 20
    assert first.vocab_size == first.tokenizer.get_vocab_size() == 300
    assert first.train.tokens[-1] == first.eos_token_id
    assert first.train.manifest["metadata"]["sources"] == [books.spec()]
    assert seen[-1].documents == 40
    text = first.tokenizer.decode(first.validation.document(0).tolist())
    assert text.startswith("book ")
    again = prepare_corpus(books, tmp_path / "cache", vocab_size=300, validation_fraction=0.2)
    assert again.folder == first.folder
    assert again.train.tokens.tolist() == first.train.tokens.tolist()
    assert len(calls) == 1
    batch = next(iter(make_dataset(again.train, batch_size=2, length=16)))
    assert batch["input_ids"].max() < first.vocab_size


def test_another_request_has_another_folder(books, tmp_path):
    options = {"vocab_size": 280, "validation_fraction": 0.2}
    first = prepare_corpus(books, tmp_path / "cache", **options)
    other = prepare_corpus(books, tmp_path / "cache", **{**options, "seed": 1})
    assert other.folder != first.folder
    book = tmp_path / "books" / "99.txt"
    book.write_text("a new book")
    grown = prepare_corpus(books, tmp_path / "cache", **options)
    assert grown.folder not in (first.folder, other.folder)
    assert grown.train.num_documents + grown.validation.num_documents == 41
    assert first.train.tokens[0] >= 0


@pytest.mark.parametrize(
    "name", ["train/tokens.bin", "validation/manifest.json", "corpus.json", "tokenizer.json"]
)
def test_a_damaged_corpus_is_built_again_and_said(books, tmp_path, caplog, name):
    options = {"vocab_size": 280, "validation_fraction": 0.2}
    first = prepare_corpus(books, tmp_path / "cache", **options)
    tokens = first.train.tokens.tolist()
    path = first.folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with caplog.at_level(logging.WARNING):
        again = prepare_corpus(books, tmp_path / "cache", **options)
    assert "is damaged and is built again" in caplog.text
    assert again.folder == first.folder
    assert again.train.tokens.tolist() == tokens
    visible = [
        entry for entry in (tmp_path / "cache").iterdir() if not entry.name.endswith(".lock")
    ]
    assert len(visible) == 2


def test_a_silent_alteration_is_found(books, tmp_path, monkeypatch):
    options = {"vocab_size": 280, "validation_fraction": 0.2}
    first = prepare_corpus(books, tmp_path / "cache", **options)
    expected = first.train.tokens.tolist()
    data = bytearray((first.folder / "train" / "tokens.bin").read_bytes())
    data[4] ^= 1
    (first.folder / "train" / "tokens.bin").write_bytes(data)
    calls = counted(monkeypatch)
    again = prepare_corpus(books, tmp_path / "cache", **options)
    assert len(calls) == 1
    assert again.train.tokens.tolist() == expected


def test_a_damaged_trained_tokenizer_is_trained_again(books, tmp_path, caplog):
    first = prepare_corpus(books, tmp_path / "cache", vocab_size=280, validation_fraction=0.2)
    (file,) = (tmp_path / "cache").glob("tokenizer-*.json")
    file.write_text("{")
    with caplog.at_level(logging.WARNING):
        again = prepare_corpus(books, tmp_path / "cache", vocab_size=280, validation_fraction=0.2)
    assert "is trained again" in caplog.text
    assert again.folder == first.folder


def test_skips_are_kept_with_the_corpus(books, tmp_path, caplog):
    (tmp_path / "books" / "bad.txt").write_bytes(b"\xff\xfe")
    with caplog.at_level(logging.WARNING):
        prepare_corpus(books, tmp_path / "cache", vocab_size=280, validation_fraction=0.2)
    assert caplog.text.count("1 documents skipped (1 not_utf8)") == 1
    corpus = prepare_corpus(books, tmp_path / "cache", vocab_size=280, validation_fraction=0.2)
    assert corpus.skipped["counts"] == {"not_utf8": 1}
    assert "bad.txt:1: not UTF-8" in corpus.skipped["examples"][0]
    strict = TextFiles(paths=books.paths)
    with pytest.raises(DocumentError, match=r"bad\.txt"):
        prepare_corpus(strict, tmp_path / "cache", vocab_size=280)


def test_a_given_tokenizer_by_object_or_path(books, tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    by_object = prepare_corpus(books, tmp_path / "c", tokenizer=tokenizer, validation_fraction=0.0)
    by_path = prepare_corpus(books, tmp_path / "c", tokenizer=tmp_path, validation_fraction=0.0)
    assert by_object.folder == by_path.folder
    assert by_object.validation.num_documents == 0
    for options in ({}, {"tokenizer": tokenizer, "vocab_size": 300}):
        with pytest.raises(ValueError, match="pass either vocab_size"):
            prepare_corpus(books, tmp_path / "c", **options)


def test_empty_splits_and_corpora_are_errors(tmp_path, tokenizer):
    (tmp_path / "one.txt").write_text("the fox\nthe dog\n")
    one = TextFiles(paths=tmp_path / "one.txt")
    with pytest.raises(
        ValueError, match=r"1 documents, and none of them fell to (train|validation)"
    ):
        prepare_corpus(one, tmp_path / "c", tokenizer=tokenizer)
    (tmp_path / "notes.jsonl").write_text('{"text": "a note"}\n{"text": "another"}\n{')
    nothing = JsonLines(paths=tmp_path / "notes.jsonl", field="txt", on_error="skip")
    why = r"3 documents skipped \(2 missing_field, 1 bad_json\), e\.g\. .*notes\.jsonl:1: .*'txt'"
    with pytest.raises(ValueError, match=f"has no documents: {why}"):
        prepare_corpus(nothing, tmp_path / "c", tokenizer=tokenizer)
    with pytest.raises(ValueError, match=f"no text to train.*{why}"):
        prepare_corpus(nothing, tmp_path / "c", vocab_size=300)
    with pytest.raises(ValueError, match="at least one source"):
        prepare_corpus([], tmp_path / "c", vocab_size=300)
    with pytest.raises(ValueError, match=r"validation_fraction must be .*got 1\.0"):
        prepare_corpus(one, tmp_path / "c", tokenizer=tokenizer, validation_fraction=1.0)
    assert not list((tmp_path / "c").glob("corpus-*"))


def test_a_full_disk_leaves_no_corpus(books, tokenizer, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_tokenizer", full)
    with pytest.raises(DiskFullError, match="corpus-"):
        prepare_corpus(books, tmp_path / "c", tokenizer=tokenizer, validation_fraction=0.2)
    assert all(entry.name.endswith(".lock") for entry in (tmp_path / "c").iterdir())


def test_of_two_that_ask_at_once_one_builds(books, tokenizer, tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    results = []

    def work():
        results.append(
            prepare_corpus(books, tmp_path / "c", tokenizer=tokenizer, validation_fraction=0.2)
        )

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len({result.folder for result in results}) == 1


def test_a_mixture_has_one_tokenizer(books, tmp_path):
    (tmp_path / "notes.jsonl").write_text(
        "".join(f'{{"text": "note {i}: zzz zzz zzz"}}\n' for i in range(60))
    )
    notes = JsonLines(paths=tmp_path / "notes.jsonl")
    left, right = prepare_mixture(
        [books, notes], tmp_path / "c", vocab_size=300, validation_fraction=0.2
    )
    assert left.tokenizer.to_str() == right.tokenizer.to_str()
    assert right.train.num_documents + right.validation.num_documents == 60
    # Both sources were seen in training the vocabulary.
    assert len(left.tokenizer.encode(" zzz").ids) == 1
    assert len(left.tokenizer.encode(" quick").ids) == 1
    batch = next(
        iter(make_dataset([left.train, right.train], batch_size=4, length=8, weights=[1, 3]))
    )
    assert batch["labels"].shape == (4, 8)
    joined = prepare_corpus(
        [books, notes], tmp_path / "c", tokenizer=left.tokenizer, validation_fraction=0.2
    )
    assert joined.train.num_tokens == left.train.num_tokens + right.train.num_tokens
