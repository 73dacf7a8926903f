import json
import os
import pathlib
import random
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
SUBJECTS = ["the cat", "a dog", "the old sailor", "my sister", "every child", "nobody"]
VERBS = ["sees", "follows", "remembers", "draws", "is looking for", "runs away from"]
OBJECTS = ["the moon", "a red boat", "two small birds", "an empty house", "the river", "some bread"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The --corpus option of a small corpus with a structure that a small model learns in a few steps."""
    chosen = random.Random(7)
    sentence = lambda: " ".join(chosen.choice(words) for words in (SUBJECTS, VERBS, OBJECTS))
    documents = [". ".join(sentence() for _ in range(12)) + f". {i}" for i in range(200)]
    file = tmp_path_factory.mktemp("corpus") / "sentences.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return f"jsonl:{file}"


@pytest.fixture(scope="session")
def options(corpus, tmp_path_factory):
    """Options that make the smoke preset small enough to be run many times."""
    cache = tmp_path_factory.mktemp("cache")
    return [
        *("--preset", "smoke", "--corpus", corpus, "--validation-fraction", "0.1"),
        *("--cache", str(cache), "--vocab-size", "320", "--batch-size", "8", "--length", "32"),
    ]


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """``refused(main, words)`` is the error with which an experiment ends before it begins a run."""

    def run(main, words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stop:
            main(words)
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert "Traceback" not in error
        assert not list(tmp_path.glob("runs*"))
        return error

    return run


@pytest.fixture
def shown_by_help(start):
    """``shown_by_help(name, heavy)`` is what an experiment's ``--help`` prints; it must import none of the heavy packages."""

    def run(name, heavy):
        code = (
            "import sys\n"
            f"from effscale.experiments.{name} import main\n"
            "try:\n    main(['--help'])\n"
            "except SystemExit as stop:\n    print('status', stop.code)\n"
            f"print('imported', [name for name in {heavy} if name in sys.modules])\n"
        )
        done = start("-c", code)
        assert "status 0\nimported []\n" in done.stdout
        return done.stdout

    return run


@pytest.fixture(scope="session")
def start():
    """``start(program, *words)`` runs a program in a process with one device; returns it when done."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(REPOSITORY / ".cache" / "killed"),  # may hold half entries
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run(*words):
        command = [sys.executable, *map(str, words)]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    return run
