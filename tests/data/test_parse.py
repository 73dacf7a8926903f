import pytest

from effscale.data import (
    HuggingFace,
    JsonLines,
    Parquet,
    StandardLibrary,
    TextFiles,
    parse_mixture,
    parse_source,
)


@pytest.mark.parametrize(
    ("spec", "source"),
    [
        ("stdlib", StandardLibrary()),
        ("text:a/*.txt", TextFiles(paths="a/*.txt")),
        ("text:a.txt,b.txt", TextFiles(paths=["a.txt", "b.txt"])),
        ("jsonl:a/**/*.jsonl#body", JsonLines(paths="a/**/*.jsonl", field="body")),
        ("parquet:a.parquet#text", Parquet(paths="a.parquet")),
        ("hf:owner/data#body", HuggingFace(name="owner/data", field="body")),
        ("hf:owner/data:raw#text", HuggingFace(name="owner/data", config="raw")),
    ],
)
def test_each_form_makes_its_source_and_back(spec, source):
    assert parse_source(spec) == source
    assert source.spec() == spec
    assert parse_source(spec, on_error="raise").on_error == "raise"


def test_the_field_may_be_left_out_and_errors_may_be_skipped():
    assert parse_source("jsonl:a", on_error="skip") == JsonLines(paths="a", on_error="skip")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("jsnl:a", "Did you mean 'jsonl'"),
        ("stdlib:x", "one of the forms stdlib"),
        ("books/*.txt", "one of the forms stdlib"),
        ("text:", "must name a file"),
        ("hf:#text", "must name a dataset"),
        ("jsonl:a#", "field must be.*got ''"),
    ],
)
def test_unknown_forms_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_source(spec)


def test_mixtures():
    sources, weights = parse_mixture(["3*stdlib", "text:*.txt"])
    assert sources == (StandardLibrary(), TextFiles(paths="*.txt"))
    assert weights == (0.75, 0.25)
    assert parse_mixture("stdlib") == ((StandardLibrary(),), (1.0,))
    with pytest.raises(ValueError, match="above 0"):
        parse_mixture(["0*stdlib"])
    with pytest.raises(ValueError, match="at least one"):
        parse_mixture([])
