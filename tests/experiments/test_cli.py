import dataclasses
import json
import os
import pathlib
import re
import signal
from typing import Literal

import jax
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effscale.command.line import messages, parse
from effscale.experiments.quickstart import PRESETS
from effscale.models import preset
from effscale.training import CheckpointError, Checkpoints, create_train_state
from effscale.training.errors import StoppedBySignal
from effscale.training.saved import config_from_json
from effscale.training.serialize import to_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Left:
    rate: float = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Right:
    steps: int = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nested:
    names: tuple[str, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    where: pathlib.Path | None = None
    mode: Literal["a", "b"] = "a"
    flag: bool = False
    part: Left | Right = Left()


configs = st.builds(
    Nested,
    names=st.lists(st.text()).map(tuple),
    pair=st.tuples(st.integers(), st.floats(allow_nan=False, allow_infinity=False)),
    where=st.none() | st.sampled_from(["a/b", "c"]).map(pathlib.Path),
    mode=st.sampled_from(["a", "b"]),
    flag=st.booleans(),
    part=st.builds(Left, rate=st.floats(0, 1)) | st.builds(Right, steps=st.integers()),
)


@given(configs)
def test_a_config_comes_back_from_json(config):
    assert config_from_json(Nested, json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nams": []}, "Nested has no field 'nams': did you mean 'names'"),
        ({"names": "abc"}, "'abc' is not of type"),
        ({"mode": "c"}, "'c' is not of type"),
        ({"pair": [1]}, "shorter"),
        ({"part": {"speed": 1}}, "Left has no field 'speed'"),
    ],
)
def test_what_does_not_fit_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        config_from_json(Nested, values)


def test_a_preset_may_be_written_both_ways_and_the_last_counts():
    assert parse(PRESETS, "", ["--preset=smoke"]) == PRESETS["smoke"]
    assert parse(PRESETS, "", ["--preset", "paper", "--preset", "smoke"]) == PRESETS["smoke"]
    changed = parse(PRESETS, "", ["--steps", "7", "--warmup", "1", "--preset", "smoke"])
    assert changed == dataclasses.replace(PRESETS["smoke"], steps=7, warmup=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "a\udcff"], "samples[0] must be valid UTF-8"),
        (["--eval-batches", str(10**30)], "eval_batches must be below 2**63"),
    ],
)
def test_values_that_no_run_can_use_are_named(words, message, capsys):
    with pytest.raises(SystemExit):
        parse(PRESETS, "", words)
    assert message in capsys.readouterr().err


def test_a_resume_starts_from_the_saved_config(tmp_path):
    saved = dataclasses.replace(PRESETS["smoke"], seed=5, out=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"config": to_json(saved)}))
    words = ["--out", str(tmp_path), "--resume"]
    assert parse(PRESETS, "", words) == dataclasses.replace(saved, resume=True)
    assert parse(PRESETS, "", [*words, "--preset", "paper"]).steps == PRESETS["paper"].steps


def test_a_saved_config_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"config": {"stepz": 3}}))
    with pytest.raises(SystemExit) as stop:
        parse(PRESETS, "", ["--out", str(tmp_path), "--resume"])
    assert stop.value.code == 2
    assert "Config has no field 'stepz': did you mean 'steps'" in capsys.readouterr().err


def test_own_errors_become_messages_and_others_keep_their_traceback(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop, messages():
        preset("gpt-2")
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: no preset 'gpt-2': did you mean 'gpt2'")
    with pytest.raises(ValueError, match="invalid literal"), messages():
        int("x")
    with pytest.raises(FileNotFoundError), messages():
        os.stat("/absent")
    monkeypatch.setenv("EFFSCALE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no preset"), messages():
        preset("gpt-2")


def test_too_little_memory_becomes_advice(monkeypatch, capsys):
    monkeypatch.delenv("EFFSCALE_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as stopped, messages():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "Out of memory allocating 9 bytes" in said
    assert "accumulate" in said
    full = "RESOURCE_EXHAUSTED: [OS error 28: ENOSPC No space left on device]"  # as TensorStore says it
    with pytest.raises(CheckpointError), messages():
        raise CheckpointError(full)
    monkeypatch.setenv("EFFSCALE_TRACEBACK", "1")
    with pytest.raises(jax.errors.JaxRuntimeError), messages():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_ends_with_the_status_of_its_signal(capsys, number, status):
    with pytest.raises(SystemExit) as stop, messages():
        raise StoppedBySignal("saved; go on with --resume", number)
    assert stop.value.code == status
    assert capsys.readouterr().err == "saved; go on with --resume\n"


def test_ctrl_c_outside_of_training_ends_without_a_traceback(capsys):
    with pytest.raises(SystemExit) as stop, messages():
        raise KeyboardInterrupt
    assert stop.value.code == 130
    assert (
        "interrupted; to resume from the last checkpoint, use --out FOLDER"
        in capsys.readouterr().err
    )


def test_a_failed_write_shows_no_traceback_of_orbax(tmp_path, caplog):
    resource = pytest.importorskip("resource")
    key = jax.random.key(0)
    state = create_train_state({"kernel": jax.random.normal(key, 50_000)}, optax.sgd(0.1), key=key)

    def fail(folder):
        checkpoints = Checkpoints(folder, asynchronous=False)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as if the disk were full
        try:
            with pytest.raises(CheckpointError, match="could not be written"):
                checkpoints.save(1, state, force=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    fail(tmp_path / "a")
    assert "Traceback" in caplog.text  # what is kept from the user of an experiment
    caplog.clear()
    with messages():
        fail(tmp_path / "b")
    assert "Traceback" not in caplog.text


def test_a_folder_without_config_is_not_resumed_by_the_default_preset(tmp_path, capsys):
    for folder, message in ((tmp_path, "no config.json"), (tmp_path / "absent", "does not exist")):
        with pytest.raises(SystemExit) as stop:
            parse(PRESETS, "", ["--out", str(folder), "--resume"])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_help_shows_the_options_of_an_experiment_before_those_of_its_parts(capsys):
    with pytest.raises(SystemExit):
        parse(PRESETS, "Trains.", ["--help"], name="prog")
    shown = capsys.readouterr().out
    options = ("steps", "length", "samples", "cache", "out")
    places = [re.search(rf"^\W*--{option}\W", shown, re.MULTILINE).start() for option in options]
    assert places == sorted(places)
