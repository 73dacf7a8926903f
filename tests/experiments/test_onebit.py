import itertools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effscale.experiments.aot import lower_onebit
from effscale.experiments.onebit.config import PRESETS, Config
from effscale.experiments.onebit.experiment import main
from effscale.experiments.onebit.optimizers import (
    AXIS,
    OPTIMIZERS,
    TWINS,
    Moments,
    Stages,
    build,
    learning_rate,
    onebit_gradients,
    rounds,
)
from effscale.experiments.onebit.runs import Pretraining
from effscale.experiments.shared.classifier.batches import TrainingBatches
from effscale.interop import load_pretrained
from effscale.optim import Round, Workers
from effscale.parallel import simulate_workers, worker_params
from effscale.training import Clip
from effscale.training.saved import config_from_json
from effscale.training.serialize import to_json

ARMS = {"gpt": ("adam", "zero_one_adam"), "bert": ("lamb", "onebit_lamb")}
PARAMETERS = {"w": jnp.array([[1.0, -2.0, 3.0]]), "b": jnp.array([0.5])}


@pytest.fixture(scope="module")
def options(corpus, tmp_path_factory):
    """Options of a run that takes seconds."""
    return [
        *("--preset", "smoke", "--corpus", corpus, "--validation-fraction", "0.1"),
        *("--cache", str(tmp_path_factory.mktemp("cache")), "--vocab-size", "300"),
        *("--gpt.length", "16", "--bert.length", "16", "--passage", "16", "--classes", "2"),
        *("--gpt.steps", "12", "--gpt.model.d-model", "16", "--gpt.model.num-layers", "1"),
        *("--bert.steps", "12", "--bert.model.d-model", "16", "--bert.model.num-layers", "1"),
        *("--finetune.train", "16", "--finetune.test", "8", "--eval-every", "12"),
        *("--finetune.batch-size", "4", "--gpt.stages.var-update-scaler", "1"),
    ]


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    """By task a finished run; and by task and optimizer the batches and the initial weights that it was given."""
    folder, batches, states = tmp_path_factory.mktemp("runs"), {}, {}
    create, rows = Pretraining._create, Pretraining._rows

    def keep_state(pretraining, seed):
        state = create(pretraining, seed)
        weights = jax.device_get(nnx.to_pure_dict(nnx.state(state.model)))
        states[pretraining.task, pretraining.name] = weights
        return state

    def keep_rows(pretraining, seed, *, validation):
        made = rows(pretraining, seed, validation=validation)
        if validation:
            return made
        kept = batches.setdefault((pretraining.task, pretraining.name), [])
        return made.map(lambda batch: kept.append(batch) or batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pretraining, "_create", keep_state)
        patch.setattr(Pretraining, "_rows", keep_rows)
        for task, arms in ARMS.items():
            words = ["--tasks", task, "--optimizers", *arms]
            main([*options, *words, "--out", str(folder / task)])
    return {task: folder / task for task in ARMS}, batches, states


def records(folder, name):
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def quadratic_step(optimizer):
    """A step on the mean over workers of (p - target)^2 / 2, each worker with a target of its own."""

    def step(params, state, target):
        at = worker_params(params, state)
        gradients = jax.tree.map(lambda p: p - target[0], at)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return simulate_workers(step, 4, AXIS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_descends_between_simulated_workers(name):
    rate = learning_rate(0.2, 0.1, 60, Stages())
    optimizer = build(
        name, rate, moments=Moments(weight_decay=0.0), stages=Stages(), steps=60, workers=4
    )
    params, state = PARAMETERS, optimizer.init(PARAMETERS)
    step = jax.jit(quadratic_step(optimizer))
    targets = jnp.array([-1.0, 0.0, 2.0, 3.0])
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(60):
            params, state = step(params, state, targets)
    distance = lambda p: sum(float(jnp.abs(x - 1.0).sum()) for x in jax.tree.leaves(p))
    assert distance(params) < 0.6 * distance(PARAMETERS)


def test_naive_compression_teaches_adam_one_variance_a_tensor():
    optimizer = optax.chain(
        onebit_gradients(Clip(10.0), Workers(AXIS, num_workers=4)), optax.scale_by_adam()
    )
    step = jax.jit(quadratic_step(optimizer))
    with jax.numpy_dtype_promotion("standard"):
        _, state = step(PARAMETERS, optimizer.init(PARAMETERS), jnp.array([-1.0, 0.0, 2.0, 3.0]))
    # Of the mean gradient (0, -3, 2) Adam sees signs with one scale, also where it is zero.
    variance = np.asarray(state[1].nu["w"]).ravel()
    assert variance[0] > 0
    assert variance == pytest.approx(np.full(3, variance[0]))


def test_stages_are_the_shares_of_the_papers():
    stages = Stages()
    assert stages.of("onebit_adam", 152_000) == 23_000
    assert stages.of("onebit_lamb", 5993) == 1000
    policies = stages.policies(152_000)
    assert policies == (12_500, 16, 32_678, 16)
    # 153 rounds in full and 74,168 in one bit, of 152,000.
    assert rounds("zero_one_adam", stages, 152_000) == 153 + 74_168
    assert rounds("onebit_adam", stages, 100) == 100
    rate = learning_rate(1.0, 0.1, 152, stages)
    assert [round(float(rate(t)), 3) for t in (0, 6, 12, 152)] == [0.0, 0.5, 1.0, 0.1]


def test_arms_get_the_same_rows_and_weights(finished):
    _, batches, states = finished
    for task, arms in ARMS.items():
        first = batches[task, arms[0]]
        assert len(first) >= 12
        for name in arms[1:]:
            for one, other in zip(first[:12], batches[task, name][:12], strict=True):
                assert one.keys() == other.keys()
                assert all(np.array_equal(one[key], other[key]) for key in one)
            jax.tree.map(np.testing.assert_array_equal, states[task, arms[0]], states[task, name])
        assert not np.array_equal(first[0]["labels"], first[1]["labels"])


@pytest.mark.parametrize("task", ARMS)
def test_a_run_leaves_what_it_promises(finished, task):
    out = finished[0][task]
    results = json.loads((out / "results.json").read_text())
    assert all(np.isfinite(v) for v in results.values() if isinstance(v, int | float))
    for name in ARMS[task]:
        run = records(out, f"{task}/seed-0/{name}")
        assert results[f"{task}_{name}_val_loss"] == run[-1]["val_loss"]
        sent = [r["sent_bytes"] for r in run if "sent_bytes" in r]
        assert len(sent) == 12
        assert results[f"{task}_{name}_megabytes"] == pytest.approx(sum(sent) / 1e6)
        assert results[f"{task}_{name}_rounds"] == sum(s > 0 for s in sent)
        accuracy = records(out, f"{task}/seed-0/{name}/passages")[-1]["test_accuracy"]
        assert results[f"{task}_{name}_accuracy"] == accuracy
        if name in TWINS:
            twin = results[f"{task}_{TWINS[name]}_val_loss"]
            difference = results[f"{task}_{name}_val_loss"] - twin
            assert results[f"{task}_{name}_val_loss_difference"] == pytest.approx(difference)
            assert results[f"{task}_{name}_times_less_sent"] > 1
    assert f"{task}_scratch_accuracy" in results
    twin, compressed = ARMS[task][:2]
    one, other = (records(out, f"{task}/seed-0/{name}") for name in (twin, compressed))
    assert results[f"{task}_{twin}_val_loss"] < one[0]["loss"]
    # The first stage is the same to the bit: 1 of 12 steps of 0/1 Adam and 2 of 1-bit LAMB are as their twins'.
    losses = [[r["loss"] for r in run if "loss" in r] for run in (one, other)]
    same = {"gpt": 2, "bert": 3}[task]
    assert losses[0][:same] == losses[1][:same]
    assert losses[0][4:] != losses[1][4:]
    report = (out / "report.md").read_text()
    for shown in ("| random weights |", "what each worker sent", f"{task.upper()}: test accuracy"):
        assert shown in report
    figure = out / "figures" / "onebit.png"
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert figure.stat().st_size < 100_000
    assert not list(out.rglob("checkpoints"))
    head = {"gpt": "lm", "bert": "mlm"}[task]
    assert load_pretrained(out / f"{task}/seed-0/{compressed}/model").config.heads[0].name == head


@pytest.mark.slow  # what every experiment shares is killed and resumed in test_pretraining and test_quickstart_resume
def test_a_run_that_is_asked_to_stop_goes_on_as_if_nothing_had_been(
    options, finished, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    step_of, run_of = TrainingBatches.__next__, Pretraining.run

    def next_batch(batches):
        if batches.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_of(batches)

    def run(self, folder, seed):
        inner, calls = self.step, itertools.count(1)

        def step(state, batch):
            # Between two synchronisations, where each worker is on its own way.
            if self.name == "zero_one_adam" and next(calls) == 10:
                os.kill(os.getpid(), signal.SIGTERM)
            return inner(state, batch)

        self.step = step
        run_of(self, folder, seed)

    assert Stages(var_update_scaler=1).policies(12).rounds(12)[9] == Round.LOCAL
    words = [*options, "--tasks", "gpt", "--optimizers", "adam", "zero_one_adam"]
    with monkeypatch.context() as patch:
        patch.setattr(TrainingBatches, "__next__", next_batch)
        with pytest.raises(SystemExit) as stopped:
            main([*words, "--out", str(out)])
    assert stopped.value.code == 128 + signal.SIGTERM
    error = capsys.readouterr().err
    assert "stopped and saved gpt/seed-0/adam/passages at step 3; to resume, use --out" in error
    with monkeypatch.context() as patch:
        patch.setattr(Pretraining, "run", run)
        with pytest.raises(SystemExit):
            main(["--out", str(out), "--resume"])
    assert "stopped and saved gpt/seed-0/zero_one_adam at step 10" in capsys.readouterr().err
    main(["--out", str(out), "--resume"])
    for name in ("adam", "adam/passages", "zero_one_adam", "zero_one_adam/passages"):
        assert records(out, f"gpt/seed-0/{name}") == records(
            finished[0]["gpt"], f"gpt/seed-0/{name}"
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--passage", "17"], "Config.passage must be at most the 16 tokens of a row, got 17"),
        (
            ["--optimizers", "onebit_adam"],
            "must be a list that includes their uncompressed baselines, adam",
        ),
        (["--optimizers", "adam", "adam"], "must be one or more different names"),
        (
            ["--workers", "1"],
            "Config.workers must be at least 2, because a single worker sends nothing, got 1",
        ),
        (
            ["--workers", "3"],
            "PretrainGPT.batch_size must be a multiple of workers x accumulate = 3, got 8",
        ),
        (["--gpt.adam-rate", "0"], "PretrainGPT.adam_rate must be above 0, got 0.0"),
        (["--gpt.stages.onebit-adam", "1"], "Stages.onebit_adam must be between 0 and 1, got 1.0"),
        (["--moments.b2", "1"], "Moments.b2 must be from 0 to below 1, got 1.0"),
        (["--resume"], "Config.resume must be set together with --out"),
    ],
)
def test_a_wrong_option_is_answered_with_what_would_do(
    words, message, options, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        main([*options, *words])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("runs*"))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_comes_back_from_json(name):
    assert config_from_json(Config, json.loads(json.dumps(to_json(PRESETS[name])))) == PRESETS[name]


def test_help_is_quick_because_it_imports_little(shown_by_help):
    heavy = ("matplotlib", "orbax", "grain", "tensorboardX", "tokenizers", "torch", "transformers")
    text = shown_by_help("onebit", heavy)
    for shown in ("smoke, default, paper", "--gpt.adam-rate", "naive"):
        assert shown in text


@pytest.mark.parametrize("task", ["gpt", "bert"])
def test_the_papers_setting_lowers_for_a_mesh(task):
    lowered = lower_onebit(task, "onebit_adam", jax.devices())
    text = lowered.as_text()
    assert "all_to_all" in text
    assert "ui8" in text
