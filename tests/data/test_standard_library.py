import sysconfig

import pytest

from effscale.data import SkipReport, StandardLibrary


@pytest.fixture(scope="module")
def library():
    report = SkipReport()
    return list(StandardLibrary().documents(report)), report


def test_holds_code_and_prose_but_no_tests(library):
    documents, report = library
    sources = [document.source for document in documents]
    assert len(set(sources)) == len(sources) > 400
    assert sources[: sources.index("pydoc_data.topics:assert")] == sorted(
        source for source in sources if source.startswith("stdlib/")
    )
    assert "stdlib/json/decoder.py" in sources
    assert sum(source.startswith("pydoc_data.topics:") for source in sources) > 60
    assert not any("/test/" in source or "site-packages" in source for source in sources)
    assert "stdlib/pydoc_data/topics.py" not in sources
    assert sum(len(document.text) for document in documents) > 8_000_000
    assert not report.counts  # its empty files are nothing to warn of


def test_is_the_same_each_time(library):
    documents, _ = library
    assert list(StandardLibrary().documents()) == documents
    assert StandardLibrary().fingerprint() == StandardLibrary().fingerprint()


def test_an_interpreter_without_sources_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match="no library source files"):
        list(StandardLibrary().documents())


def test_on_error_is_checked():
    with pytest.raises(Exception, match="on_error"):
        StandardLibrary(on_error="ignore")
