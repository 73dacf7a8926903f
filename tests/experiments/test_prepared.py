"""What every experiment refuses before it writes into the folder of a run."""

import importlib
import json
import pathlib

import pytest

from effscale.command.folder import resumable
from effscale.command.line import parse
from effscale.experiments.shared.prepared import corpus_digests, prepared_corpora
from effscale.locks import ProcessLock
from effscale.training import MirrorError, RunFolder, RunMirror
from effscale.training.errors import StoppedBySignal

ROWS = ["--batch-size", "8"]
PASSAGES = ["--passage", "8", "--finetune.train", "16", "--finetune.test", "16"]
EXPERIMENTS = {
    "quickstart": ROWS,
    "data_efficiency": ROWS,
    "onebit": PASSAGES,
    "seqlen_curriculum": ROWS,
}


@pytest.fixture(scope="module")
def texts(corpus, tmp_path_factory):
    """A folder with a text, the same with a line more, and a cache."""
    folder = tmp_path_factory.mktemp("texts")
    lines = pathlib.Path(corpus.removeprefix("jsonl:")).read_text()
    more = json.dumps({"text": "one more sailor. " * 30}) + "\n"
    (folder / "then.jsonl").write_text(lines)
    (folder / "now.jsonl").write_text(lines + more)
    return folder


@pytest.fixture
def begun(texts, tmp_path):
    """``begun(name)`` begins a run on the text of then, without training; the words that resume it, and its folder."""

    def begin(name):
        experiment = importlib.import_module(f"effscale.experiments.{name}")

        def config(file):
            words = ["--preset", "smoke", "--corpus", f"jsonl:{texts / file}", *EXPERIMENTS[name]]
            words += ["--cache", str(texts / "cache"), "--vocab-size", "320"]
            return parse(experiment.PRESETS, "", [*words, "--out", str(tmp_path / "run")])

        old = config("then.jsonl")
        then, _ = prepared_corpora(old)
        data = json.loads(json.dumps(corpus_digests(then)).replace("then.jsonl", "now.jsonl"))
        RunFolder.create(tmp_path / "run", config=config("now.jsonl"), data=data).close()
        return experiment, ["--out", str(tmp_path / "run"), "--resume"], tmp_path / "run"

    return begin


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_run_does_not_go_on_with_another_corpus(begun, name, capsys):
    experiment, words, out = begun(name)
    before = content(out)
    with pytest.raises(SystemExit) as stop:
        experiment.main(words)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert f"error: {out}: the run was trained on different data" in message
    assert "tokenizer.digest: " in message
    assert "now.jsonl#text.train.documents: " in message or "validation.documents: " in message
    assert "Restore the files that it was started with, or start a new run" in message
    assert content(out) == before


def test_two_processes_do_not_resume_one_run(begun, capsys):
    experiment, words, out = begun("quickstart")
    before = content(out)
    other = ProcessLock(out / ".lock", "writing")
    other.acquire()
    with pytest.raises(SystemExit) as stop:
        experiment.main(words)
    other.release()
    assert stop.value.code == 2
    assert f"is writing {out}. Wait for it to end" in capsys.readouterr().err
    assert content(out) == before


def test_a_copy_that_fails_does_not_hide_why_a_run_stopped(tmp_path, monkeypatch, capsys):
    def fail(self):
        raise MirrorError("memory://run: the copy is incomplete")

    monkeypatch.setattr(RunMirror, "close", fail)
    folder = RunFolder.create(tmp_path / "run", config={}, mirror="memory://stopped/run")
    with pytest.raises(StoppedBySignal, match="--resume"), resumable(folder):
        raise StoppedBySignal("stopped", None)
    assert "warning: memory://run: the copy is incomplete" in capsys.readouterr().err
    RunFolder.create(tmp_path / "run", resume=True).close()  # it was released


def test_a_mirror_is_a_url():
    quickstart = importlib.import_module("effscale.experiments.quickstart")
    with pytest.raises(ValueError, match=r"mirror must be a URL such as .*, got 'copies/run'"):
        quickstart.Config(mirror="copies/run")
