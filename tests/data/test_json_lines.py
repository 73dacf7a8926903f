import json

import pytest

from effscale.data import DocumentError, JsonLines, SkipReport


def write(path, *lines):
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    )
    return path


def test_reads_a_field_and_ignores_blank_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"body": "eins"}', "", json.dumps({"body": "zwei 三"}))
    documents = list(JsonLines(paths=path, field="body").documents())
    assert [document.text for document in documents] == ["eins", "zwei 三"]
    assert documents[1].source == f"{path}:3"


BAD = {
    "bad_json": ('{"text": ', r"a\.jsonl:2: not JSON"),
    "missing_field": (
        '{"txt": "x", "id": 1}',
        r"a\.jsonl:2: no field 'text'; the fields are 'txt', 'id'",
    ),
    "not_text": ('{"text": 3}', r"a\.jsonl:2: int instead of text"),
    "not_utf8": (b'{"text": "\xff"}', r"a\.jsonl:2: not UTF-8 \(byte 0xff\)"),
    "empty": ('{"text": " "}', r"a\.jsonl:2: the document is empty"),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_line_is_named_or_counted(tmp_path, reason):
    line, message = BAD[reason]
    path = write(tmp_path / "a.jsonl", '{"text": "one"}', line, '{"text": "two"}')
    with pytest.raises(DocumentError, match=message) as caught:
        list(JsonLines(paths=path).documents())
    assert caught.value.reason == reason
    report = SkipReport()
    kept = [d.text for d in JsonLines(paths=path, on_error="skip").documents(report)]
    assert kept == ["one", "two"]
    assert report.counts == {reason: 1}


def test_half_a_surrogate_pair_and_an_array_are_faults(tmp_path):
    path = write(tmp_path / "a.jsonl", r'{"text": "\ud800"}', "[1]", "[" * 200_000, '{"text": "a"}')
    report = SkipReport()
    assert [d.text for d in JsonLines(paths=path, on_error="skip").documents(report)] == ["a"]
    assert report.counts == {"not_utf8": 1, "bad_json": 2}


def test_an_empty_file_is_a_fault(tmp_path):
    with pytest.raises(DocumentError, match="the file is empty"):
        list(JsonLines(paths=write(tmp_path / "a.jsonl", "")).documents())


def test_an_empty_field_is_refused():
    with pytest.raises(ValueError, match=r"field must be .*got ''"):
        JsonLines(paths="a", field="")
