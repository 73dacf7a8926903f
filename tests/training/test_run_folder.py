import dataclasses
import functools
import json
import pathlib
import platform
import re

import jax
import pytest

from effscale.locks import LockedError, ProcessLock
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
    with pytest.raises(FileNotFoundError, match="Run without resume"):
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


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path):
    folder = RunFolder.create(tmp_path / "run", config={"seed": 0})
    again = RunFolder.create(tmp_path / "run", resume=True)  # by the same process
    again.close()
    other = ProcessLock(tmp_path / "run" / ".lock", "working")  # no other process would get it
    with pytest.raises(LockedError):
        other.acquire()
    folder.close()
    other.acquire()
    before = folder.config_file.read_bytes()
    with pytest.raises(LockedError, match=r"another process \(pid .*is writing .*/run\. Wait"):
        RunFolder.create(tmp_path / "run", data={"text": {}}, resume=True)
    other.release()
    assert folder.config_file.read_bytes() == before
    (tmp_path / "new").mkdir()
    other = ProcessLock(tmp_path / "new" / ".lock", "working")
    other.acquire()
    with pytest.raises(LockedError, match=r"is writing .*/new\. Wait"):
        RunFolder.create(tmp_path / "new", config={"seed": 1})
    other.release()
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == [".lock"]
    with RunFolder.create(tmp_path / "new", config={"seed": 1}) as new:  # a lock alone is no run
        assert new.config() == {"seed": 1}


def test_a_folder_without_its_config_is_not_resumed(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"no config\.json.*without --resume.*another --out"
    ):
        RunFolder.create(tmp_path, resume=True)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: cannot be read"):
        RunFolder.create(tmp_path, data={}, resume=True).config()

    (tmp_path / "config.json").write_text('{"config": {}, "data": 5}')
    with pytest.raises(ValueError, match=r"config\.json: data must be an object, got 5"):
        RunFolder.create(tmp_path, data={}, resume=True)


def test_a_run_goes_on_with_its_own_data_only(tmp_path, caplog):
    data = {"tokenizer": {"digest": "a"}, "text": {"train": {"documents": 3, "digest": "b"}}}
    resume = functools.partial(RunFolder.create, tmp_path / "run", resume=True)
    RunFolder.create(tmp_path / "run", config={"seed": 0}, data=data).close()
    before = (tmp_path / "run" / "config.json").read_bytes()
    changed = {**data, "text": {"train": {"documents": 4, "digest": "c"}}}
    message = r"text\.train\.digest: 'b' in the folder, 'c' now; text\.train\.documents: 3 in the folder, 4 now\)\. Restore"
    with pytest.raises(ValueError, match=message):
        resume(data=changed)
    resume(data=data).close()
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    resume(data={"task": {"digest": "d"}}).close()  # another part of the run
    with pytest.raises(ValueError, match=r"task\.digest: 'd' in the folder"):
        resume(data={"task": {"digest": "e"}})
    with pytest.raises(ValueError, match=r"text\.train"):
        resume(data=changed)
    # A run from before digests were kept.
    RunFolder.create(tmp_path / "old", config={}).close()
    RunFolder.create(tmp_path / "old", data=data, resume=True).close()
    assert "has no digests of its data" in caplog.text
