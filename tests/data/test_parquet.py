import sys

import pytest

from effscale.data import DocumentError, Parquet, SkipReport


@pytest.fixture
def table(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="the extra data is not installed")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    texts = [f"text {i} ü" for i in range(10)]
    texts[4], texts[6] = None, ""
    pq.write_table(pa.table({"body": texts, "number": list(range(10))}), path, row_group_size=3)
    return path


def test_reads_a_column_in_batches(table):
    report = SkipReport()
    source = Parquet(paths=table, field="body", batch_rows=4, on_error="skip")
    documents = list(source.documents(report))
    assert [document.text for document in documents] == [
        f"text {i} ü" for i in range(10) if i not in (4, 6)
    ]
    assert documents[-1].source == f"{table}:row 10"
    assert report.counts == {"not_text": 1, "empty": 1}


def test_faults_are_named(table):
    with pytest.raises(DocumentError, match=r"a\.parquet:row 5: NoneType instead of text"):
        list(Parquet(paths=table, field="body").documents())
    with pytest.raises(DocumentError, match=r"no field 'bdy'; the fields are 'body', 'number'"):
        list(Parquet(paths=table, field="bdy").documents())
    table.write_bytes(table.read_bytes()[:-20])
    with pytest.raises(DocumentError, match=r"a\.parquet: cannot be read"):
        list(Parquet(paths=table, field="body").documents())


def test_the_missing_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'effscale\[data\]'"):
        list(Parquet(paths=tmp_path / "a.parquet").documents())


def test_impossible_batch_is_refused():
    with pytest.raises(ValueError, match="batch_rows must be at least 1, got 0"):
        Parquet(paths="a", batch_rows=0)


def test_page_checksums_are_verified(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="the extra data is not installed")
    import pyarrow.parquet as pq

    file = tmp_path / "a.parquet"
    table = pa.table({"text": ["a text of a document"]})
    plain = {"compression": None, "use_dictionary": False, "write_statistics": False}
    pq.write_table(table, file, write_page_checksum=True, **plain)
    content = file.read_bytes()
    damaged = content.replace(b"a text of a document", b"a text of a dOcument", 1)
    assert damaged != content
    file.write_bytes(damaged)
    with pytest.raises(DocumentError, match=r"a\.parquet: cannot be read.*CRC"):
        list(Parquet(paths=file).documents())
