import dataclasses
import json
import pathlib
import platform
import re

import jax
import pytest

from effscale.training import RunFolder
from effscale.training.serialize import differences, to_json, write_atomic


@dataclasses.dataclass(frozen=True)
class Inner:
    rates: tuple[float, ...] = (0.1, 0.2)
    path: pathlib.Path = pathlib.Path("a/b")


@dataclasses.dataclass(frozen=True)
class Config:
    inner: Inner = dataclasses.field(default_factory=Inner)
    kind: type = int


def test_a_new_folder_says_what_was_run_and_with_what(tmp_path):
    folder = RunFolder.create(tmp_path / "run", config=Config())
    written = json.loads(folder.config_file.read_text())
    assert written["config"] == {
        "inner": {"rates": [0.1, 0.2], "path": "a/b"},
        "kind": "builtins.int",
    }
    assert folder.config() == written["config"]
    assert written["versions"]["jax"] == jax.__version__
    assert written["versions"]["python"] == platform.python_version()
    assert written["devices"]["count"] == 8
    assert written["devices"]["platform"] == "cpu"
    assert "git_revision" in written


def test_a_second_run_never_overwrites_the_first(tmp_path):
    first = RunFolder.create(tmp_path / "run", config={"seed": 0})
    before = first.config_file.read_bytes()
    with pytest.raises(FileExistsError, match=re.escape(str(tmp_path / "run"))):
        RunFolder.create(tmp_path / "run", config={"seed": 1})
    again = RunFolder.create(tmp_path / "run", config={"seed": 1}, resume=True)
    assert again == first
    assert first.config_file.read_bytes() == before
    (tmp_path / "empty").mkdir()
    RunFolder.create(tmp_path / "empty")


def test_default_names_do_not_collide(tmp_path):
    folders = [RunFolder.create(name="quickstart", root=tmp_path) for _ in range(3)]
    assert len({folder.path for folder in folders}) == 3
    assert all(re.match(r"\d{8}-\d{6}(-\d)?$", folder.path.name) for folder in folders)
    assert {folder.path.parent for folder in folders} == {tmp_path / "quickstart"}


def test_bad_requests(tmp_path):
    with pytest.raises(ValueError, match="name of the experiment"):
        RunFolder.create()
    with pytest.raises(ValueError, match="resume=True needs the path"):
        RunFolder.create(name="x", root=tmp_path, resume=True)
    with pytest.raises(FileNotFoundError, match="run without resume"):
        RunFolder.create(tmp_path / "absent", resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        RunFolder.create(tmp_path / "file")


def test_results_and_report(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    results = {"val_loss": 3.14159, "tokens_seen": 2_000_000, "converged": True}
    folder.write_results(results)
    assert folder.results() == results
    (folder.figures / "loss.png").write_bytes(b"")
    folder.write_report("Quickstart", results, text="It learns.")
    report = folder.report_file.read_text()
    assert report.startswith("# Quickstart\n\nIt learns.\n")
    assert "| val_loss | 3.142 |" in report
    assert "| tokens_seen | 2,000,000 |" in report
    assert "| converged | True |" in report
    assert "![loss](figures/loss.png)" in report


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.txt"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")  # fails after the file was opened
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_differences_are_named():
    first = to_json({"a": {"b": (1, 2), "c": 0}, "d": 1})
    second = to_json({"a": {"b": (1, 3), "c": 0}, "e": 1})
    assert differences(first, second) == {
        "a.b": ([1, 2], [1, 3]),
        "d": (1, "(absent)"),
        "e": ("(absent)", 1),
    }
