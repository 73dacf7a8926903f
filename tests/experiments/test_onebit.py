"""The study onebit: its optimizers, two steps of an arm and its fine-tuning, the paper's program, and wrong options."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.aot.experiments import lower_onebit
from effscale.command.line import parse
from effscale.experiments import onebit
from effscale.experiments.onebit.optimizers import CLIP, Optimization, onebit_gradients
from effscale.experiments.shared import bert
from effscale.experiments.shared.classifier.recipe import Recipe
from effscale.optim import Round, Workers
from effscale.parallel import simulate_workers, worker_params
from effscale.study.command import conduct
from effscale.training import Clip, read_jsonl

PARAMETERS = {"w": jnp.array([[1.0, -2.0, 3.0]]), "b": jnp.array([0.5])}
WORKERS = Workers("data", num_workers=4)
TARGETS = jnp.array([-1.0, 0.0, 2.0, 3.0])


def quadratic_step(optimizer):
    """A step on the mean over workers of (p - target)^2 / 2, each worker with a target of its own."""

    def step(params, state, target):
        at = worker_params(params, state)
        gradients = jax.tree.map(lambda p: p - target[0], at)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return simulate_workers(step, 4, "data")


@pytest.mark.parametrize("name", onebit.NAMES)
def test_every_optimizer_keeps_the_types_of_its_state(name):
    optimizer = Optimization(steps=60, adam_rate=0.2, lamb_rate=0.2).build(name, WORKERS)
    state = jax.eval_shape(optimizer.init, PARAMETERS)
    with jax.numpy_dtype_promotion("standard"):
        params, new = jax.eval_shape(quadratic_step(optimizer), PARAMETERS, state, TARGETS)
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert types((params, new)) == types((PARAMETERS, state))


def test_naive_compression_teaches_adam_one_variance_a_tensor():
    optimizer = optax.chain(onebit_gradients(Clip(10.0), WORKERS), optax.scale_by_adam())
    step = jax.jit(quadratic_step(optimizer))
    with jax.numpy_dtype_promotion("standard"):
        _, state = step(PARAMETERS, optimizer.init(PARAMETERS), TARGETS)
    # Of the mean gradient (0, -3, 2) Adam sees signs with one scale, also where it is zero.
    variance = np.asarray(state[1].nu["w"]).ravel()
    assert variance[0] > 0
    assert variance == pytest.approx(np.full(3, variance[0]))


def test_naive_compression_clips_by_one_norm():
    """The root mean square of the workers' norms, whose gradients are (1, 1), (2, 2), (3, 3) and (4, 4)."""
    params = {"w": jnp.zeros(2)}
    optimizer = onebit_gradients(CLIP, WORKERS)
    mean, _ = simulate_workers(
        lambda state, g: optimizer.update({"w": jnp.full(2, g[0])}, state), 4, "data"
    )(optimizer.init(params), jnp.array([1.0, 2.0, 3.0, 4.0]))
    np.testing.assert_allclose(mean["w"], 2.5 / np.sqrt(2 * 30 / 4), rtol=1e-6)


def test_stages_are_the_shares_of_the_papers():
    paper = onebit.PRESETS["paper"].bert
    assert paper.steps == 152_000
    assert paper.policies() == (12_500, 16, 32_678, 16)
    # 153 rounds in full and 74,168 in one bit, of 152,000.
    rounds = paper.policies().rounds(paper.steps)
    assert int((rounds != Round.LOCAL).sum()) == 153 + 74_168
    short = dataclasses.replace(paper, steps=152, adam_rate=1.0, final=0.1)
    rate = short.learning_rate("adam")
    assert [round(float(rate(t)), 3) for t in (0, 6, 12, 152)] == [0.0, 0.5, 1.0, 0.1]


def test_two_steps_and_fine_tuning_of_an_arm_and_its_baseline(corpus, tmp_path):
    """The whole study, on tiny models: one uncompressed step, then one of 1-bit Adam."""
    smoke = onebit.PRESETS["smoke"]
    model = bert.ModelConfig(num_layers=1, d_model=16, num_heads=2)
    config = dataclasses.replace(
        smoke,
        corpus=(corpus,),
        validation_fraction=0.1,
        cache=tmp_path / "cache",
        out=tmp_path / "run",
        arms=("bert_adam", "bert_onebit_adam", "bert_scratch"),
        vocab_size=300,
        bert=dataclasses.replace(smoke.bert, steps=3, length=16, model=model),
        eval_every=3,
        classes=2,
        passage=16,
        finetune=Recipe(epochs=1, batch_size=8, learning_rate=5e-3, train=16, test=8),
    )
    figures = conduct(config, onebit.study).figures
    read = lambda name: read_jsonl(tmp_path / "run" / name / "metrics.jsonl")
    one, other = (read(f"bert_{name}/seed-0") for name in ("adam", "onebit_adam"))
    # The same rows and weights, and the same first stage, to the bit.
    losses = [[r["loss"] for r in run if "loss" in r] for run in (one, other)]
    assert losses[0][:2] == losses[1][:2]
    assert figures["bert_onebit_adam_val_loss"] == other[-1]["val_loss"]
    sent = [r["sent_bytes"] for r in other if "sent_bytes" in r]
    assert figures["bert_onebit_adam_megabytes"] == pytest.approx(sum(sent) / 1e6)
    assert figures["bert_onebit_adam_rounds"] == 3
    assert sent[0] > 10 * sent[-1]
    assert figures["bert_onebit_adam_times_less_sent"] > 1
    for arm in config.arms:
        accuracy = read(f"{arm}/seed-0/passages")[-1]["test_accuracy"]
        assert figures[f"{arm}_accuracy"] == accuracy
    # Pretrained models are fine-tuned, not new ones.
    first = [read(f"{arm}/seed-0/passages")[0]["loss"] for arm in config.arms]
    assert len(set(first)) == 3
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["bert_scratch_val_loss"] is None
    figure = tmp_path / "run/figures/bert_differences.png"
    assert figure.exists()
    assert not figure.with_name("gpt_differences.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--passage", "33"], "Config.passage must be at most the 32 tokens of a row, got 33"),
        (["--workers", "1"], "Config.workers must be at least 2, got 1"),
        (["--workers", "3"], "PretrainGPT.batch_size must be a multiple of workers=3, got 8"),
        (["--gpt.adam-rate", "0"], "PretrainGPT.adam_rate must be above 0, got 0.0"),
        (["--bert.zero-one.var-freeze", "1"], "ZeroOne.var_freeze must be between 0 and 1, got 1"),
        (["--gpt.b2", "1"], "PretrainGPT.b2 must be from 0 to below 1, got 1.0"),
        (["--finetune.test", "3"], "Recipe.test must be a number of passages, at least classes=4"),
    ],
)
def test_a_wrong_option_is_answered_with_what_would_do(words, message, capsys):
    with pytest.raises(SystemExit):
        parse(onebit.PRESETS, "", ["--preset", "smoke", *words])
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize("task", onebit.TASKS)
def test_the_papers_setting_lowers_for_a_mesh(task):
    text = lower_onebit(task, "onebit_adam", jax.devices()).as_text()
    assert "all_to_all" in text
    assert "ui8" in text
