"""The experiment ``bloom`` on a folder of a user's own: what it leaves, a stop in each run, several processes, and what goes wrong."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import sys

import jax
import numpy as np
import pytest

from effscale.experiments.bloom import PRESETS, Config, runs
from effscale.experiments.bloom.config import CleaningConfig
from effscale.experiments.bloom.corpus import prepare
from effscale.experiments.bloom.experiment import main
from effscale.experiments.bloom.tasks import Cell, Tasks
from effscale.interop import load_pretrained
from effscale.parallel import MeshConfig
from effscale.training import read_jsonl

WORDS = {
    "aa": ("mila", "sora", "tuvi", "kade", "nomo", "pell", "ruka", "vasi"),
    "bb": ("drunt", "skelf", "grom", "blint", "thrak", "snorf", "pliv", "wexo"),
    "cc": ("ibo", "uwe", "ayo", "ekita", "oluma", "iseru", "abeka", "ugoni"),
}
TASK = """
task: {name}
templates:
  - name: which
    input: "{{text}} Which is it? Answer:"
    target: "{{label}}"
    choices: ["day", "night"]
"""
RUNS = ("pretrain", "finetune")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Three invented languages, two tasks, and a model that is trained in seconds."""
    chosen = random.Random(3)
    data, tasks = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("tasks")
    for language, words in WORDS.items():
        (data / language).mkdir()
        for number in range(12):
            text = " ".join(chosen.choice(words) for _ in range(60))
            (data / language / f"{number}.txt").write_text(text)
        for task in ("learned", "unseen"):
            (tasks / f"{task}.yaml").write_text(TASK.format(name=task))
            place = tasks / task / language
            place.mkdir(parents=True)
            for split in ("train", "validation", "test"):
                with (place / f"{split}.jsonl").open("w") as file:
                    for number in range(12):
                        text, label = words[number % 8], ("day", "night")[number % 2]
                        file.write(json.dumps({"text": text, "label": label}) + "\n")
    return [
        *("--preset", "smoke", "--data", str(data), "--tasks", str(tasks)),
        *("--languages", *WORDS, "--new-languages", "cc", "--new-tasks", "unseen"),
        *("--cache", str(tmp_path_factory.mktemp("cache")), "--vocab-size", "300"),
        *("--validation-fraction", "0.2", "--length", "32", "--model.d-model", "16"),
        *("--cleaning.max-character-repetition", "1.0", "--cleaning.near-duplicates", "None"),
        *("--finetune.batch-size", "8", "--eval-batch", "8"),
    ]


@pytest.fixture(scope="module")
def one_device():
    """Runs take one of the eight, which compiles twice as fast."""
    build = MeshConfig.build
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MeshConfig, "build", lambda mesh: build(mesh, jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def finished(options, one_device, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    main([*options, "--out", str(folder)])
    return folder


def test_what_a_run_leaves(finished):
    named = json.loads((finished / "results.json").read_text())
    for name in ("val_loss", "zero_shot_before", "zero_shot_after", "fertility_ratio_max"):
        assert np.isfinite(named[name])
    assert named["chance"] == 0.5
    # A tokenizer of three languages has fewer tokens for each than one of its own.
    assert named["fertility_ratio_max"] > 1
    titles = [table["title"] for table in named["tables"]]
    assert len(titles) == 5
    rows = json.loads((finished / "datasheet.json").read_text())
    assert [row["name"] for row in rows] == list(WORDS)
    assert sum(row["weight"] for row in rows) == pytest.approx(1)
    assert (finished / "figures" / "bloom.png").stat().st_size > 10_000


def test_batches_grow_and_the_rate_counts_their_tokens(finished):
    records = [
        r for r in read_jsonl(finished / "seed-0" / "pretrain" / "metrics.jsonl") if "loss" in r
    ]
    tokens = np.diff([0, *(record["tokens"] for record in records)])
    assert (tokens // 32).tolist() == [8, 12, 16, 16, 16]


def test_both_runs_leave_a_model(finished):
    models = [load_pretrained(finished / "seed-0" / name / "model") for name in RUNS]
    assert models[0].config.inputs.vocab_size == 512  # 300, padded to a multiple of 512
    embeddings = [np.asarray(model.embed.tokens.embedding.get_value()) for model in models]
    assert not np.array_equal(*embeddings)


@pytest.mark.slow  # tests/study stops and resumes quicker runs
def test_a_run_that_is_stopped_in_each_part_is_the_same(finished, options, tmp_path, monkeypatch):
    out = ["--out", str(tmp_path / "run")]

    def stopping(function, last):
        calls = iter(range(1, 100))

        def stop(*arguments):
            if next(calls) == last:
                os.kill(os.getpid(), signal.SIGTERM)
            return function(*arguments)

        return stop

    for attempt, (owner, name, last) in enumerate(
        [(runs, "resize_rows", 3), (runs.KeepBest, "offer", 1)]
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stopping(getattr(owner, name), last))
            with pytest.raises(SystemExit) as stopped:
                main([*options, *out] if attempt == 0 else [*out, "--resume"])
        assert stopped.value.code == 128 + signal.SIGTERM
    main([*out, "--resume"])
    for name in (
        *(f"{name}/metrics.jsonl" for name in RUNS),
        *(f"zero_shot_{when}/found.json" for when in ("before", "after")),
    ):
        files = [folder / "seed-0" / name for folder in (tmp_path / "run", finished)]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow  # tests/parallel/test_curves.py compares smaller runs
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_make_what_one_does(start, options, tmp_path, processes):
    launcher = ("-m", "tests.parallel.local_launch", "--devices", "1", "--processes")
    program = ("-m", "effscale.experiments.bloom", *options)
    alone, together = tmp_path / "alone", tmp_path / "together"
    done = start(*program, "--out", alone)
    assert done.returncode == 0, done.stderr
    mesh = ("--mesh.fsdp", "2", "--mesh.data", "-1")
    done = start(
        *launcher, str(processes), "--", sys.executable, *program, *mesh, "--out", together
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in RUNS:
        records = [read_jsonl(f / "seed-0" / name / "metrics.jsonl") for f in (alone, together)]
        for figure in ("loss", "tokens"):
            values = [[r[figure] for r in each if figure in r] for each in records]
            np.testing.assert_allclose(values[0], values[1], rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--languages", "aa", "cc", "zz"), "language 'zz' has no"),
        (("--new-tasks", "unsee"), "unseen"),
        (("--new-tasks", "unseen", "learned"), "new_tasks must leave at least one task to learn"),
        (("--new-languages", "aa", "bb", "cc"), "but not all"),
        (
            ("--pretrain.ramp-increment", "3"),
            "ramp_increment must be a divisor",
        ),
        (("--data", "nowhere"), "language 'aa' has no"),
    ],
)
def test_what_cannot_work_is_refused_by_name(
    options, one_device, tmp_path, capsys, change, message
):
    with pytest.raises(SystemExit) as refused:
        main([*options, *change, "--out", str(tmp_path / "run")])
    assert refused.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tasks: shutil.rmtree(tasks / "unseen"), "task 'unseen' has no test examples"),
        (lambda tasks: [f.unlink() for f in tasks.rglob("validation.jsonl")], "no task has 8 validation examples in a new language"),
        (lambda tasks: [f.unlink() for f in tasks.rglob("train.jsonl")], "no training examples for the tasks ['learned']"),
        (lambda tasks: shutil.copy(tasks / "unseen.yaml", tasks / "more.yaml"), "two files have the same task name"),
    ],
)  # fmt: skip
def test_tasks_that_lack_something_are_refused(
    options, one_device, tmp_path, capsys, change, message
):
    tasks = tmp_path / "tasks"
    shutil.copytree(options[options.index("--tasks") + 1], tasks)
    change(tasks)
    with pytest.raises(SystemExit):
        main([*options, "--tasks", str(tasks), "--out", str(tmp_path / "run")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_changed_examples_are_not_resumed(finished, options, one_device, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    file = next(pathlib.Path(options[options.index("--tasks") + 1]).rglob("test.jsonl"))
    before = file.read_text()
    try:
        file.write_text(before.replace("day", "night"))
        with pytest.raises(SystemExit):
            main(["--out", str(run), "--resume"])
    finally:
        file.write_text(before)
    assert "tasks" in capsys.readouterr().err


def test_examples_of_a_sorted_file_are_mixed_and_any_unicode_is_read(options, tmp_path):
    data, tasks = (pathlib.Path(options[options.index(name) + 1]) for name in ("--data", "--tasks"))
    shutil.copytree(tasks, tmp_path / "tasks")
    place = tmp_path / "tasks" / "unseen" / "aa" / "test.jsonl"
    labels = ["day"] * 20 + ["night"] * 20
    lines = [json.dumps({"text": f"a\u2028{i}", "label": x}, ensure_ascii=False) for i, x in enumerate(labels)]  # fmt: skip
    place.write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    config = Config(data=data, tasks=tmp_path / "tasks", languages=("aa", "cc"), new_languages=("cc",), new_tasks=("unseen",))  # fmt: skip
    read = Tasks(config).examples(Cell("unseen", "aa", "new task"), "test")
    assert {example["label"] for example in read[:16]} == {"day", "night"}
    assert sorted(e["text"] for e in read) == sorted(f"a\u2028{i}" for i in range(40))


def test_the_tokenizer_learns_from_a_sample_of_each_language(options, tmp_path):
    """A sample of a few words has fewer pairs to merge."""
    data, tasks = (pathlib.Path(options[options.index(name) + 1]) for name in ("--data", "--tasks"))
    cleaning = CleaningConfig(max_character_repetition=1.0, near_duplicates=None)
    config = Config(data=data, tasks=tasks, languages=("aa", "cc"), new_languages=("cc",), new_tasks=("unseen",), code=0.0, cleaning=cleaning, vocab_size=330, validation_fraction=0.2, cache=tmp_path)  # fmt: skip
    words = lambda config: prepare(config).tokenizer.get_vocab_size()
    assert words(dataclasses.replace(config, tokenizer_characters=20)) < words(config)


def test_examples_without_a_field_are_refused_before_anything_is_trained(
    options, one_device, tmp_path, capsys
):
    tasks = tmp_path / "tasks"
    shutil.copytree(options[options.index("--tasks") + 1], tasks)
    file = tasks / "unseen" / "cc" / "test.jsonl"
    file.write_text('{"text": "ibo"}\n')
    with pytest.raises(SystemExit) as refused:
        main([*options, "--tasks", str(tasks), "--out", str(tmp_path / "run")])
    assert refused.value.code == 2
    assert "no field 'label'; its fields are 'text'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_published_settings():
    """Table 3 of the paper, as the presets hold it."""
    for name, steps_of_ramp in (("bloom-560m", 47_230), ("bloom-176b", 12_658)):
        config = PRESETS[name]
        assert config.pretrain.ramp().starts[-1] == steps_of_ramp
        schedule = config.pretrain.schedule(2048).build()
        assert float(schedule(183_105 * 2048)) == pytest.approx(config.pretrain.learning_rate)
        assert float(schedule(200e6 * 2048)) == pytest.approx(config.pretrain.final_learning_rate)
    assert PRESETS["bloom-176b"].model.build(250_680).inputs.vocab_size == 250_880
