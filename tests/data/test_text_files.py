import gzip
import io
import itertools
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effscale.data import DocumentError, SkipReport, TextFiles
from effscale.data.sources import files


def texts(source, report=None):
    return [document.text for document in source.documents(report)]


def test_each_file_is_a_document_in_the_order_of_names(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, text in {"b.txt": "zwei ü", "a.txt": "one\r\n", "sub/c.txt": "三"}.items():
        (tmp_path / name).write_bytes(text.encode())
    source = TextFiles(paths=str(tmp_path / "**" / "*.txt"))
    assert texts(source) == ["one\r\n", "zwei ü", "三"]
    assert next(d.source for d in source.documents()) == str(tmp_path / "a.txt")
    assert texts(source) == texts(source)


def test_a_file_named_twice_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    assert texts(TextFiles(paths=[tmp_path / "a.txt", str(tmp_path / "*.txt")])) == ["one"]


def test_separator_gzip_and_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone<|endoftext|>two<|endoftext|>\n")
    with gzip.open(tmp_path / "b.txt.gz", "wb") as stream:
        stream.write(b"three<|endoftext|>four")
    source = TextFiles(paths=[tmp_path / "a.txt", tmp_path / "b.txt.gz"], separator="<|endoftext|>")
    assert texts(source) == ["one", "two", "three", "four"]


def test_a_bad_piece_costs_only_itself_and_is_named_by_line(tmp_path, caplog):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\nbad \xff\n\nalso good\n")
    with pytest.raises(DocumentError, match=r"a\.txt:2: not UTF-8 \(byte 0xff on line 2\).*skip"):
        texts(TextFiles(paths=path, separator="\n"))
    report = SkipReport()
    with caplog.at_level(logging.WARNING):
        assert texts(TextFiles(paths=path, separator="\n", on_error="skip"), report) == [
            "good",
            "also good",
        ]
    assert report.counts == {"not_utf8": 1}
    assert report.examples[0].startswith(f"{path}:2: not UTF-8")
    assert "1 documents skipped (1 not_utf8)" in caplog.text


def test_empty_unreadable_and_damaged_files_are_counted(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text(" \n\n ")
    (tmp_path / "c.txt").write_text("text")
    whole = gzip.compress(b"x" * 100_000)
    (tmp_path / "d.txt.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "e.txt").symlink_to(tmp_path / "nowhere")
    paths = [str(tmp_path / "*.txt"), str(tmp_path / "*.gz")]
    report = SkipReport()
    assert texts(TextFiles(paths=paths, on_error="skip"), report) == ["text"]
    assert report.counts == {"empty": 2, "unreadable": 2}
    assert report.total == 4
    with pytest.raises(DocumentError, match=r"a\.txt: the file is empty"):
        texts(TextFiles(paths=paths))
    with pytest.raises(DocumentError, match=r"d\.txt\.gz: cannot be read"):
        texts(TextFiles(paths=tmp_path / "d.txt.gz"))


def test_a_report_keeps_few_examples_and_counts_all(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\n" * 50)
    report = SkipReport()
    assert not texts(TextFiles(paths=tmp_path / "a.txt", separator="\n", on_error="skip"), report)
    assert report.total == 50
    assert len(report.examples) == report.max_examples == 5


def test_the_report_is_filled_when_the_reader_stops_early(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\none\ntwo\n")
    report = SkipReport()
    documents = TextFiles(paths=tmp_path / "a.txt", separator="\n", on_error="skip").documents(
        report
    )
    assert next(documents).text == "one"
    documents.close()
    assert report.total == 1


def test_what_matches_nothing_or_is_a_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file matches .*\*\.text"):
        texts(TextFiles(paths=str(tmp_path / "*.text")))
    with pytest.raises(ValueError, match=r"is a folder\. Match its files with a glob"):
        texts(TextFiles(paths=tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": ()}, "at least one path"),
        ({"paths": "a", "separator": ""}, "separator must be.*got ''"),
        ({"paths": "a", "max_document_bytes": 1}, "max_document_bytes must be at least 4.*got 1"),
    ],
)
def test_impossible_fields_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TextFiles(**options)


@given(
    text=st.text(alphabet="ab\nü三𝄞;", max_size=200),
    separator=st.sampled_from([None, "\n", ";", "ab", "\n\n"]),
    limit=st.integers(4, 40),
    block=st.integers(1, 16),
)
def test_pieces_are_the_stream_cut_at_separators(text, separator, limit, block):
    mark = separator.encode() if separator else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK", block)
        pieces = list(files.split_stream(io.BytesIO(text.encode()), mark, limit))
    decoded = [piece.decode() for _, piece in pieces]
    assert all(len(piece) <= limit + len(mark or b"") for _, piece in pieces)
    if separator is None:
        assert "".join(decoded) == text
    elif all(len(part.encode()) <= limit for part in text.split(separator)):
        expected = text.split(separator)
        assert decoded == (expected[:-1] if expected[-1] == "" else expected)
    if separator is None:
        starts = itertools.accumulate((part.count("\n") for part in decoded), initial=1)
        assert [line for line, _ in pieces] == list(starts)[: len(pieces)]


def test_a_file_beyond_the_limit_is_read_in_parts_at_line_ends(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(100)))
    source = TextFiles(paths=tmp_path / "a.txt", max_document_bytes=64)
    parts = texts(source)
    assert "".join(parts) == (tmp_path / "a.txt").read_text()
    assert len(parts) > 5
    assert all(part.endswith("\n") and len(part) <= 64 for part in parts)


def test_the_fingerprint_follows_the_content_and_the_cut(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = TextFiles(paths=path).fingerprint()
    assert first == TextFiles(paths=path).fingerprint()
    assert first != TextFiles(paths=path, separator="\n").fingerprint()
    path.write_text("another")
    assert first != TextFiles(paths=path).fingerprint()
