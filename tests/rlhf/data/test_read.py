"""Records from files of every kind, and what is said of those that cannot be used."""

import gzip
import json
import logging

import pytest

from effscale.rlhf.data import Record, RecordError, RecordReport, read_records

ROWS = [{"prompt": f"Q{i}", "chosen": f"a{i}", "rejected": f"b{i}", "id": i} for i in range(600)]
RECORDS = [Record(prompt=f"Q{i}", chosen=f"a{i}", rejected=f"b{i}") for i in range(600)]


def lines(rows):
    return "\n".join(json.dumps(row) for row in rows).encode()


def parquet(rows):
    pa = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


FILES = {
    "a.jsonl": lines,
    "blank.jsonl": lambda rows: b"\xef\xbb\xbf\n \n" + lines(rows).replace(b"\n", b"\n\n"),
    "a.json": lambda rows: json.dumps(rows).encode(),
    "indented.json": lambda rows: b"\xef\xbb\xbf\n" + json.dumps(rows, indent=2).encode() + b"\n",
    "lines.json": lines,
    "a.jsonl.gz": lambda rows: gzip.compress(lines(rows)),
    "a.json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "a.parquet": parquet,
}


@pytest.mark.parametrize("name", FILES)
def test_files(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name](ROWS))
    assert read_records(tmp_path / name) == RECORDS


def test_several_files_and_a_glob(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jsonl").write_bytes(lines(ROWS[i * 2 : i * 2 + 2]))
    assert read_records(f"{tmp_path}/*.jsonl") == RECORDS[:6]
    assert read_records([tmp_path / "2.jsonl", tmp_path / "0.jsonl"]) == RECORDS[4:6] + RECORDS[:2]


def test_rows_of_any_kind():
    assert read_records(ROWS) == RECORDS
    assert read_records(row for row in ROWS) == RECORDS
    assert read_records(ROWS[:1], format=lambda row: Record(prompt=row["chosen"])) == [
        Record(prompt="a0")
    ]
    with pytest.raises(ValueError, match=r"mapping with the keys 'train', 'test'.*one split"):
        read_records({"train": ROWS, "test": ROWS})
    with pytest.raises(RecordError, match=r"^row 2: a row must be a mapping of fields, got str"):
        read_records([ROWS[0], "x"])


def test_a_hugging_face_data_set():
    datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
    assert read_records(datasets.Dataset.from_list(ROWS)) == RECORDS


GOOD = json.dumps(ROWS[0]).encode()
BAD = {
    "bad_json": (b'{"prompt": ', r"a\.jsonl:4: not JSON \(Expecting value"),
    "not_utf8": (b'{"prompt": "\xff"}', r"a\.jsonl:4: not UTF-8 \(byte 0xff\)"),
    "missing_field": (b'{"prompt": "Q", "chosen": "a"}', r"a\.jsonl:4: no field 'rejected'; the fields are 'prompt', 'chosen'"),
    "wrong_type": (b'{"prompt": "Q", "chosen": "a", "rejected": null}', r"a\.jsonl:4: the field 'rejected' must be a list of messages, got null"),
}  # fmt: skip


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_line_is_named_or_counted(reason, tmp_path):
    line, message = BAD[reason]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join((GOOD, b"", GOOD, line, GOOD)))
    with pytest.raises(RecordError, match=message) as caught:
        read_records(tmp_path / "a.jsonl")
    assert caught.value.reason == reason
    report = RecordReport()
    kept = read_records(tmp_path / "a.jsonl", on_error="skip", report=report)
    assert kept == RECORDS[:1] * 3
    assert report.counts == {reason: 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[\n{"prompt": "Q", "chosen": "a"},\n{"prompt": }]', r"a\.json:3: not JSON"),
        (b'[\n{"prompt": "Q"}\n{"prompt": "Q"}]', r"a\.json:2: the list does not continue"),
        (b'[{"prompt": "Q"},\n 3]', r"a\.json:2: a row must be a mapping of fields, got int"),
        (b'[{"prompt": "Q"},\n{"prompt": "\xff"}]', r"a\.json:2: not UTF-8"),
        (b'[{"prompt": "Q"}', r"a\.json:1: the list does not continue"),
        (b"[" * 100_000, r"a\.json:1: not JSON"),
        (b'{\n"prompt": "Q"}', r"a\.json:1: not JSON"),
    ],
)
def test_a_damaged_list_is_named_by_its_line(content, message, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(RecordError, match=message):
        read_records(tmp_path / "a.json")


def test_a_damaged_file(tmp_path):
    whole = gzip.compress(lines(ROWS))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RecordError, match=r"a\.jsonl\.gz: cannot be read"):
        read_records(tmp_path / "a.jsonl.gz")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    with pytest.raises(RecordError, match=r"a\.parquet:row 1: cannot be read"):
        read_records(tmp_path / "a.parquet")


def test_what_nothing_can_be_learned_from_is_counted(caplog):
    pair = lambda prompt, chosen, rejected: {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
    }
    rows = [pair("Q", "same", "same"), pair("Q", " ", "b"), pair("", "a", "b"), pair("Q", "a", ""), pair("Q", "x", "x"), ROWS[0]]  # fmt: skip
    report = RecordReport()
    with caplog.at_level(logging.WARNING):
        assert read_records(rows, report=report) == RECORDS[:1]
    assert report.counts == {"identical": 2, "empty": 3}
    assert (
        "of 6 records: 5 records left out (3 empty, 2 identical), e.g. row 1: chosen and rejected are the same"
        in caplog.text
    )
    with pytest.raises(ValueError, match="a list has no record to learn from: 1 record left out"):
        read_records(rows[:1])
    caplog.clear()
    read_records(ROWS)
    assert not caplog.records


def test_nothing_to_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n")
    with pytest.raises(
        ValueError, match=r"has no record to learn from.*a\.jsonl: the file is empty"
    ):
        read_records(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="a list has no record to learn from: no records left out"):
        read_records([])
    with pytest.raises(FileNotFoundError, match="no file matches"):
        read_records(tmp_path / "b.jsonl")


def test_options_that_do_not_exist():
    with pytest.raises(ValueError, match="format='hh-rlhf': did you mean 'hh_rlhf'"):
        read_records(ROWS, format="hh-rlhf")
