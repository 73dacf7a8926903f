"""The experiment ``rlhf``: all steps on a tiny model, what they leave, a kill in each of them, and what goes wrong."""

import itertools
import json
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest

from effscale.data import train_tokenizer
from effscale.data.sources import standard_library
from effscale.experiments.rlhf import PRESETS, Config, data, experiment
from effscale.experiments.rlhf.config import LearningConfig
from effscale.experiments.rlhf.experiment import main
from effscale.experiments.shared.assets import MissingAssetError
from effscale.interop import load_encoder, load_pretrained
from effscale.models import ClassHead
from effscale.parallel import MeshConfig
from effscale.rlhf.data import Record

STEPS = ("base", "sft", "reward", "ppo", "dpo")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Options of a run that takes seconds."""
    file = tmp_path_factory.mktemp("records") / "pairs.jsonl"
    with file.open("w") as out:
        for i in range(80):
            record = {
                "prompt": f"What follows {i}? ",
                "chosen": f"{i + 1} does.",
                "rejected": f"{i}",
            }
            out.write(json.dumps(record) + "\n")
    return [
        *("--preset", "smoke", "--data", str(file), "--vocab-size", "280", "--length", "32"),
        *("--prompt-length", "24", "--response-length", "6", "--model.d-model", "16"),
        *("--base.steps", "4", "--sft.steps", "4", "--reward-model.steps", "4"),
        *("--policy.steps", "4", "--eval-every", "2", "--held-out", "0.2", "--split", "all"),
        *("--ema-decay", "0.5", "--ppo.pretraining-coef", "1.0"),
    ]


@pytest.fixture(scope="module")
def one_device():
    """Runs take one of the eight, which compiles twice as fast, unless they ask for a mesh of their own."""
    build = MeshConfig.build
    alone = lambda mesh: build(mesh, jax.devices()[:1] if mesh == MeshConfig() else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MeshConfig, "build", alone)
        yield


@pytest.fixture(scope="module")
def finished(options, one_device, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    main([*options, "--step", *STEPS, "--out", str(folder)])
    return folder


def records(folder, step):
    lines = (folder / "seed-0" / step / "metrics.jsonl").read_text().splitlines()
    timed = lambda name: name.endswith("seconds") or "per_second" in name
    return [{k: v for k, v in json.loads(line).items() if not timed(k)} for line in lines]


def test_what_a_run_leaves(finished):
    named = json.loads((finished / "results.json").read_text())
    assert 0 <= named["reward_accuracy"] <= 1
    for name in ("sft", "ppo", "dpo"):
        assert np.isfinite(named[f"{name}_reward_mean"])
        assert named[f"{name}_perplexity"] > 1
    # The fine-tuned model is its own reference; the policy that learned is another model.
    np.testing.assert_allclose(named["sft_kl"], 0, atol=1e-3)
    assert named["kl_per_response"] == named["ppo_kl"] != 0
    assert (finished / "figures" / "rlhf.png").stat().st_size > 10_000
    report = (finished / "report.md").read_text()
    assert "## Conversations" in report
    assert report.count("- ppo (") == PRESETS["smoke"].samples


def test_each_step_leaves_a_model_folder(finished):
    score = ClassHead(num_classes=1, name="score", pool="last", bias=False)
    load_pretrained(finished / "seed-0" / "reward" / "model", heads=(score,))
    kernel = lambda step, name="model": np.asarray(
        load_pretrained(finished / "seed-0" / step / name).embed.tokens.embedding.get_value()
    )
    weights = [kernel(step) for step in ("base", "sft", "ppo", "dpo")]
    for a, b in itertools.combinations(weights, 2):
        assert not np.array_equal(a, b)
    assert (finished / "seed-0" / "ppo" / "model" / "tokenizer.json").is_file()
    # The average of the policy lies between where it began and where it is.
    mean = kernel("ppo", "model-ema")
    assert 0 < np.abs(mean - kernel("ppo")).max() < np.abs(kernel("sft") - kernel("ppo")).max()
    assert all(r["actor_text_loss"] > 0 for r in records(finished, "ppo") if "score" in r)


# One step of them, PPO, is stopped and resumed in tests/rlhf/test_step.py as well.
@pytest.mark.slow
def test_a_run_that_is_killed_in_each_step_is_the_same(finished, options, tmp_path, monkeypatch):
    out = ["--out", str(tmp_path / "run")]
    advance = data.Rows.__next__
    for attempt in range(len(STEPS) + 1):
        # Each attempt ends the step before and is stopped in the next one.
        calls, last = itertools.count(1), 3 if attempt == 0 else 4

        def killing(rows, calls=calls, last=last):
            if next(calls) == last:
                os.kill(os.getpid(), signal.SIGTERM)
            return advance(rows)

        if attempt == len(STEPS):
            monkeypatch.setattr(data.Rows, "__next__", advance)
            main([*out, "--resume"])
            break
        monkeypatch.setattr(data.Rows, "__next__", killing)
        with pytest.raises(SystemExit) as stopped:
            main([*options, "--step", *STEPS, *out] if attempt == 0 else [*out, "--resume"])
        assert stopped.value.code == 128 + signal.SIGTERM
    for step in STEPS:
        assert records(tmp_path / "run", step) == records(finished, step)
    shown = lambda name: name.endswith(("_mean", "_kl", "_perplexity", "_accuracy"))
    figures = [
        {k: v for k, v in json.loads((place / "results.json").read_text()).items() if shown(k)}
        for place in (tmp_path / "run", finished)
    ]
    assert figures[0] == figures[1]


def test_a_step_alone_continues_a_run(finished, options, tmp_path):
    """A step of an earlier run's folder is there for the next one; and what it needs has to be."""
    with pytest.raises(SystemExit) as missing:
        main([*options, "--step", "ppo", "--out", str(tmp_path / "fresh")])
    assert missing.value.code == 2
    main(["--out", str(finished), "--resume", "--step", "grpo"])
    assert "grpo_reward_mean" in json.loads((finished / "results.json").read_text())


def test_eight_devices_make_what_one_does(finished, tmp_path):
    """The policy's step again, its weights divided; the figures are those of the models that were saved."""
    folder = tmp_path / "divided"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "seed-0" / "ppo")
    mesh = ("--mesh.data", "1", "--mesh.fsdp", "4", "--mesh.tensor", "2")
    main(["--out", str(folder), "--resume", "--step", "ppo", "--offload", *mesh])
    there, here = (json.loads((f / "results.json").read_text()) for f in (finished, folder))
    for name in ("sft_reward_mean", "ppo_reward_mean", "ppo_kl", "ppo_perplexity"):
        np.testing.assert_allclose(here[name], there[name], rtol=1e-3, atol=1e-4)
    scores = lambda run: [r["score"] for r in records(run, "ppo") if "score" in r]
    np.testing.assert_allclose(scores(folder), scores(finished), rtol=1e-3, atol=1e-4)
    assert len(scores(folder)) == 4


def test_a_batch_that_the_devices_cannot_divide_is_refused_at_once(options, tmp_path):
    with pytest.raises(SystemExit):
        main([*options, "--sft.batch-size", "12", "--out", str(tmp_path), "--mesh.fsdp", "8"])
    assert not list(tmp_path.iterdir())


def test_a_reward_model_with_another_tokenizer_is_refused_at_once(
    finished, options, tmp_path, capsys
):
    """It would read the actor's tokens as other words."""
    place = finished / "seed-0" / "reward" / "model"
    given = [*options, "--step", "base", "--out", str(tmp_path / "run"), "--reward"]
    data.check_reward_tokenizer(place, load_encoder(finished / "seed-0" / "sft" / "model"))
    other = tmp_path / "other"
    shutil.copytree(place, other)
    (other / "tokenizer.json").write_text(train_tokenizer(["other words"], vocab_size=260).to_str())
    with pytest.raises(SystemExit):
        main([*given, str(other)])
    assert "reward must be a model with the actor's tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_command_joins_other_processes_and_refuses(options, tmp_path, monkeypatch, capsys):
    """Without joining them, each process would take itself for the only one."""
    joined = lambda: monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(experiment, "initialize", joined)
    with pytest.raises(SystemExit):
        main([*options, "--out", str(tmp_path / "run")])
    assert "rlhf must run in one process, because every step" in capsys.readouterr().err


def test_what_is_held_out_is_not_in_the_text():
    source = 'def f(x):\n    """Return it.\n\n    All of it.\n    """\n    return x\n\n\ndef g():\n    """Stay."""\n'
    left = data.without(source, {"Return it."})
    assert "Return it" not in left
    assert "All of it" not in left
    assert "return x" in left
    assert "Stay." in left


def test_the_records_of_steps_are_apart(monkeypatch):
    files = standard_library._files  # a sixth of the library is enough
    monkeypatch.setattr(standard_library, "_files", lambda root: files(root)[::6])
    phases = data.read_phases(Config(split="1,1,1"))
    parts = [
        set(map(id, part)) for part in (phases.sft, phases.reward, phases.prompts, phases.held_out)
    ]
    assert sum(map(len, parts)) == len(set().union(*parts))
    learned = {text for r in (*phases.sft, *phases.reward) for text in (r.chosen, r.rejected)}
    assert not any(r.chosen in learned for r in phases.held_out)
    assert isinstance(phases.sft[0], Record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"step": ("ppo", "sft")},
            r"step must be different steps in the order \['sft', 'ppo'\], got",
        ),
        ({"actor": pathlib.Path("x")}, "step must be steps without base if --actor is given"),
        ({"minibatches": 5}, r"minibatches must be a divisor of policy\.batch_size=64.*, got 5"),
        ({"split": "1,2"}, "split must be three numbers .*, got '1,2'"),
        ({"held_out": 1.0}, r"held_out must be between 0 and 1, got 1\.0"),
        (
            {"min_response_length": 40},
            "min_response_length must be from 0 to response_length=32.*, got 40",
        ),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        Config(**change)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        LearningConfig(steps=0)


def test_the_preset_of_a_real_model_has_real_pairs():
    config = PRESETS["smollm2-135m"]
    try:
        phases = data.read_phases(config)
        encoder = data.make_encoder(config, phases)
    except MissingAssetError as error:
        pytest.skip(str(error))
    assert not {r.prompt for r in phases.reward} & {r.prompt for r in phases.held_out}
    rows = data.pairs_of(config, encoder, phases.held_out)
    assert rows["chosen"].shape[1] == 256
    assert len(rows["chosen"]) > 40
    text = encoder.tokenizer.decode(rows["chosen"][0].tolist(), skip_special_tokens=False)
    assert "<|im_start|>assistant" in text
    assert encoder.tokenizer.id_to_token(encoder.stop_token_ids[0]) == "<|im_end|>"
