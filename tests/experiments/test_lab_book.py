"""The lab book's program: what it takes from a run, what it writes into pages, what it refuses."""

import json

import pytest

from effscale.experiments.lab_book import BEGIN, END, main, rendered

CONFIG = {
    "config": {"steps": 4, "out": "/somewhere/run", "resume": False, "cache": None},
    "machine": {"cpu_count": 2},
    "devices": {"kind": "cpu", "count": 1, "processes": 1},
    "versions": {"jax": "0.10.2", "grain": None},
}
TABLE = {"title": "Loss", "left": 1, "rows": [["arm", "mean"], ["none", "4.11"]]}
RESULTS = {"saved": 0.391, "loss": 4.114, "folder": "/somewhere/run", "seeds": {"loss": [4.0, 4.2]}}


@pytest.fixture
def book(tmp_path):
    """A repository with one page, and a finished run."""
    run, page = tmp_path / "run", tmp_path / "experiments" / "mine"
    for folder in (run / "figures", page, tmp_path / "docs"):
        folder.mkdir(parents=True)
    (run / "results.json").write_text(json.dumps({**RESULTS, "tables": [TABLE]}))
    (run / "config.json").write_text(json.dumps(CONFIG))
    (run / "figures" / "loss.png").write_bytes(b"a figure")
    (page / "README.md").write_text(
        f"It saves 1 %<!-- mine saved .0% -->.\n\n{BEGIN}\nold\n{END}\n\nEnd.\n"
    )
    (tmp_path / "README.md").write_text("A loss of 0<!-- mine loss .2f -->.\n")
    return tmp_path


def test_a_run_fills_its_page_and_every_number_that_is_marked(book):
    page = book / "experiments" / "mine"
    main([str(book / "run"), str(page)])
    assert (page / "README.md").read_text() == (
        f"It saves 39 %<!-- mine saved .0% -->.\n\n{BEGIN}\nLoss:\n\n| arm | mean |\n|---|---:|\n| none | 4.11 |\n\n"
        f"Machine: CPU cores 2; devices 1 x cpu; processes 1. Versions: jax 0.10.2.\n{END}\n\nEnd.\n"
    )
    assert (book / "README.md").read_text() == "A loss of 4.11<!-- mine loss .2f -->.\n"
    assert (page / "loss.png").read_bytes() == b"a figure"
    kept = json.loads((page / "results.json").read_text())
    assert kept["seeds"] == {"loss": [4.0, 4.2]}
    both = (page / "results.json").read_text() + (page / "config.json").read_text()
    assert "somewhere" not in both
    assert json.loads((page / "config.json").read_text())["config"] == {"steps": 4}


def test_a_second_page_of_an_experiment(book):
    """It lies in a folder below the first, with its own results; other pages' numbers stay theirs."""
    first, second = book / "experiments" / "mine", book / "experiments" / "mine" / "more"
    main([str(book / "run"), str(first)])
    before = (first / "README.md").read_text()
    second.mkdir()
    (second / "README.md").write_text(f"{BEGIN}\n{END}\n")
    main([str(book / "run"), str(second)])
    assert "| none | 4.11 |" in (second / "README.md").read_text()
    assert (first / "README.md").read_text() == before


def test_pages_follow_their_committed_results(book, monkeypatch):
    page = book / "experiments" / "mine"
    main([str(book / "run"), str(page)])
    text = (book / "README.md").read_text()
    (book / "README.md").write_text(text.replace("4.11", "3.99"))
    assert rendered(book / "README.md", book / "experiments") == text
    monkeypatch.chdir(book)
    main([])
    assert (book / "README.md").read_text() == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1<!-- mine lost .2f -->", "no figure 'lost'; did you mean 'loss'"),
        ("1<!-- yours loss .2f -->", "no figure 'loss'"),
    ],
)
def test_a_number_of_no_figure_is_refused(book, text, message, capsys):
    (book / "README.md").write_text(text)
    with pytest.raises(SystemExit) as stop:
        main([str(book / "run"), str(book / "experiments" / "mine")])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
