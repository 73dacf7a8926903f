import contextlib
import dataclasses
import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effscale.experiments.seqlen_curriculum import report
from effscale.experiments.seqlen_curriculum.arms import (
    Arm,
    Training,
    create_state,
    make_arms,
    make_step,
)
from effscale.experiments.seqlen_curriculum.config import PRESETS
from effscale.experiments.seqlen_curriculum.experiment import main
from effscale.models import num_params, preset
from effscale.parallel import batch_sharding, shardings
from effscale.training import LinearPacing, Stages

ARMS = ("small", "large_x4", "large_curriculum_x4")
# By hand: 6144 tokens are 48 steps of 8 rows of 16, and 24 of 16 rows. The curriculum lasts 24 steps, from 8 to 16 tokens,
# in fours: 8 + 8 (b + 1)/24 is 12 at step 11 and 16 at step 23. Those 23 steps take 16 (11 * 8 + 12 * 12) = 3712
# tokens, and 10 more of 256 tokens take the other 2432.
LENGTHS = [8] * 11 + [12] * 12 + [16] * 10
STEPS = {"small": 48, "large_x4": 24, "large_curriculum_x4": len(LENGTHS)}


@pytest.fixture(scope="module")
def options(corpus, tmp_path_factory):
    """Options of a run that takes seconds."""
    cache = tmp_path_factory.mktemp("cache")
    return [
        *("--preset", "smoke", "--corpus", corpus, "--validation-fraction", "0.1"),
        *("--cache", str(cache), "--vocab-size", "320", "--length", "16", "--tokens", "6144"),
        *("--batch-size", "8", "--batch-factor", "2", "--curriculum", "1", "--min-length", "8"),
        *("--granularity", "4", "--warmup", "3", "--model.d-model", "32"),
        *("--learning-rate", "5e-3", "--evaluations", "2"),
    ]


@pytest.fixture(scope="module")
def folder(options, tmp_path_factory):
    """A finished run with two seeds, and two more factors of the learning rate, one of which diverges."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    compiled, close, said = [], Training.close, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        count = lambda training: [s.num_compilations for s in training._staged.values()]
        patch.setattr(Training, "close", lambda t: compiled.append(count(t)) or close(t))
        factors = ["--learning-rate-factors", "1e30", "4"]
        main([*options, *factors, "--seeds", "2", "--out", str(out)])
    # One program for the small batch, one for the large one and one a length, whatever the learning rate.
    assert compiled == [[1, 1, 3]]
    assert "seed-0/large_x1e+30 diverged at step" in said.getvalue()
    return out


def records(folder, arm, seed=0):
    lines = (folder / f"seed-{seed}" / arm / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def trained(folder, arm, seed=0):
    return [r for r in records(folder, arm, seed) if "loss" in r]


@pytest.mark.slow  # random_ltd_bert and data_efficiency, which share its parts, are run whole
def test_each_arm_consumes_the_tokens_in_the_steps_counted_by_hand(folder):
    rows = {"small": 8, "large_x4": 16, "large_curriculum_x4": 16}
    results = json.loads((folder / "results.json").read_text())
    for arm, steps in STEPS.items():
        lengths = LENGTHS if "curriculum" in arm else [16] * steps
        tokens = np.cumsum([rows[arm] * length for length in lengths])
        for seed in (0, 1):
            steps_of = trained(folder, arm, seed)
            assert [r["step"] for r in steps_of] == list(range(1, steps + 1))
            assert [r["tokens"] for r in steps_of] == tokens.tolist()
        assert tokens[-2] < 6144 <= tokens[-1]
        assert results[f"{arm}_steps"] == steps
        assert results[f"{arm}_lengths"] == len(set(lengths))


@pytest.mark.slow  # random_ltd_bert and data_efficiency, which share its parts, are run whole
def test_the_learning_rate_rises_by_steps_and_falls_by_tokens(folder):
    for arm, peak in (("small", 5e-3), ("large_x4", 2e-2), ("large_curriculum_x4", 2e-2)):
        steps = trained(folder, arm)
        before = np.array([0, *(r["tokens"] for r in steps)][: len(steps)], float)
        origin = before[3]
        share = np.clip((before - origin) / (6144 - origin), 0, 1)
        expected = peak * (0.1 + 0.9 * (1 + np.cos(np.pi * share)) / 2)
        expected[:3] = peak * np.arange(3) / 3
        np.testing.assert_allclose([r["learning_rate"] for r in steps], expected, rtol=1e-4)


@pytest.mark.slow  # random_ltd_bert and data_efficiency, which share its parts, are run whole
def test_figures_are_those_of_the_records(folder):
    results = json.loads((folder / "results.json").read_text())
    for arm in ARMS:
        ratios, largest, norms, last = [], [], [], []
        for seed in (0, 1):
            steps = trained(folder, arm, seed)
            losses = [r["loss"] for r in steps]
            ratio = [1.0] + [losses[i] / min(losses[:i]) for i in range(1, len(losses))]
            np.testing.assert_allclose([r["loss_ratio"] for r in steps], ratio, rtol=1e-6)
            ratios.append(ratio)
            largest.append(max(r["variance_max"] for r in steps[3:]))
            norms.append([r["variance_norm"] for r in steps[3:]])
            evaluated = [r for r in records(folder, arm, seed) if "val_loss" in r]
            assert evaluated[-1]["step"] == STEPS[arm]
            assert evaluated[-1]["val_loss"] < evaluated[0]["val_loss"]  # it learned
            last.append(evaluated[-1]["val_loss"])
        expected = {
            "val_loss": np.mean(last),
            "val_loss_std": np.std(last, ddof=1),
            "unstable_steps": np.mean([sum(r > 1.2 for r in ratio) for ratio in ratios]),
            "greatest_loss_ratio": np.mean([max(ratio) for ratio in ratios]),
            "variance_max": np.mean(largest),
            "variance_norm": np.mean([max(norm) for norm in norms]),
            "correlation_variance_norm": np.mean(
                [np.corrcoef(r[3:], n)[0, 1] for r, n in zip(ratios, norms, strict=True)]
            ),
            "diverged": 0,
        }
        for name, value in expected.items():
            assert results[f"{arm}_{name}"] == pytest.approx(value, rel=1e-6), (arm, name)
        assert results[f"{arm}_seconds"] > 0
    assert results["small_reached"] == 2
    assert results["small_tokens_to_reach"] <= 6144


@pytest.mark.slow  # random_ltd_bert and data_efficiency, which share its parts, are run whole
def test_a_run_leaves_what_it_promises(folder):
    for name in ("training", "instability", "validation"):
        figure = folder / "figures" / f"{name}.png"
        assert figure.read_bytes().startswith(b"\x89PNG")
        assert figure.stat().st_size < 100_000
    text = (folder / "report.md").read_text()
    assert "| arm | rows x rate | seed 0 | seed 1 | mean | std |" in text
    assert "| large batch, 4 L, short first | 16 x 0.02 |" in text
    assert json.loads((folder / "config.json").read_text())["versions"]["jax"]
    assert len(list((folder / "tensorboard").rglob("events*"))) == 10
    assert not list(folder.rglob("checkpoints"))


@pytest.mark.slow  # random_ltd_bert and data_efficiency, which share its parts, are run whole
def test_a_diverging_run_is_a_result_and_other_learning_rates_can_follow(folder):
    results = json.loads((folder / "results.json").read_text())
    for arm in ("large_x1e+30", "large_curriculum_x1e+30"):
        assert results[f"{arm}_diverged"] == 2
        assert results[f"{arm}_val_loss"] is None
        assert results[f"{arm}_tokens_to_reach"] is None
        assert results[f"{arm}_unstable_steps"] >= 10
        assert trained(folder, arm)[-1]["skipped_in_row"] == 10
    assert (folder / "figures" / "learning_rates.png").is_file()
    assert "| large batch, 1e+30 L | 2 of 2 |" in (folder / "report.md").read_text()


def test_a_large_batch_is_the_small_ones_of_its_seed(options, corpus):
    from effscale.data import parse_mixture, prepare_mixture
    from effscale.study.command import parse

    config = parse(PRESETS, "", options)
    sources, weights = parse_mixture(config.corpus)
    corpora = prepare_mixture(
        sources, config.cache, vocab_size=320, validation_fraction=0.1, seed=0
    )
    training = Training(config, corpora, weights)
    small, large = iter(training.batches(8, seed=1)), iter(training.batches(16, seed=1))
    for _ in range(3):
        whole, parts = next(large), [next(small), next(small)]
        for name, value in whole.items():
            np.testing.assert_array_equal(value, np.concatenate([part[name] for part in parts]))
    other = next(iter(training.batches(8, seed=2)))
    assert not np.array_equal(other["input_ids"], parts[1]["input_ids"])
    assert training.held_out[0]["input_ids"].shape == (16, 16)  # evaluation sees whole rows


def made_up(losses, validation, **changes):
    """A run of batches of 2 rows, of 4 tokens in its first three steps and 8 then."""
    arm = Arm(
        name="arm",
        batch_size=2,
        learning_rate=1.0,
        factor=1.0,
        lengths=Stages((0, 3), (4, 8)),
        num_steps=6,
    )
    steps = [
        {"step": i, "loss": loss, "variance_norm": float(i), "variance_max": 1.0, "grad_norm": 1.0}
        for i, loss in enumerate(losses, 1)
    ]
    evaluated = [{"step": step, "val_loss": loss} for step, loss in validation.items()]
    fields = {
        "arm": arm,
        "records": steps + evaluated,
        "step_seconds": {4: 1.0, 8: 3.0},
        "warmup": 1,
        "threshold": 1.2,
        "window": 16,
    }
    return report.Run(**fields | changes)


def test_tokens_and_seconds_until_a_loss_is_reached():
    reference = made_up([4.0] * 6, {2: 3.0, 6: 2.5})
    one = made_up([4.0, 2.0, 3.0, 2.0, 1.0, 1.1], {2: 3.0, 4: 2.0, 6: 2.2})
    named = one.figures(reference)
    # Half way from step 2 to step 4: three steps of 2 * 4 tokens and of a second each.
    assert (named["tokens_to_reach"], named["seconds_to_reach"]) == (24, 3)
    assert (named["seconds"], named["reached"], named["val_loss"]) == (12, 1, 2.2)
    assert named["unstable_steps"] == 1
    assert named["greatest_loss_ratio"] == 1.5
    assert named["greatest_val_loss_ratio"] == pytest.approx(1.1)
    # Stretches of 16 tokens: two steps of 8; one of 8 and one of 16 that begins in it; then one of 16 each.
    np.testing.assert_allclose(one.pooled_losses(), [3, (8 * 3 + 16 * 2) / 24, 1, 1.1])
    assert named["greatest_pooled_loss_ratio"] == pytest.approx(1.1)
    # After the warmup of one step; the maximum does not vary.
    ratios = [0.5, 1.5, 1.0, 0.5, 1.1]
    expected = np.corrcoef(ratios, [2, 3, 4, 5, 6])[0, 1]
    assert named["correlation_variance_norm"] == pytest.approx(expected)
    assert np.isnan(named["correlation_variance_max"])
    never = reference.figures(one)
    assert never["reached"] == 0
    assert np.isnan(never["tokens_to_reach"])


def test_a_run_that_ended_early_has_no_last_loss():
    reference = made_up([4.0] * 6, {6: 2.5})
    broken = made_up([4.0, 5.0, None], {2: 3.0})
    named = broken.figures(reference)
    assert named["diverged"] == 1
    assert named["unstable_steps"] == 2  # that without a loss, too
    assert named["greatest_loss_ratio"] == 1.25
    assert np.isnan(named["val_loss"])
    figures = report.figures({"small": [reference, reference], "other": [reference, broken]})
    assert figures["other_diverged"] == 1
    assert figures["other_val_loss"] == 2.5
    nothing = report.figures({"small": [reference], "other": [broken]})
    assert nothing["other_val_loss"] is None
    assert nothing["other_tokens_to_reach"] is None


def test_a_run_whose_last_updates_were_all_skipped_diverged_too():
    reference = made_up([4.0] * 6, {6: 2.5})
    broken = made_up([4.0, None, None, None, None, None], {2: 3.0})
    assert len(broken.losses) == broken.arm.num_steps
    assert broken.diverged
    assert np.isnan(broken.last_loss)
    assert not reference.diverged


@pytest.mark.parametrize("granularity", [1, None, 16])
def test_rows_become_whole_before_the_tokens_are_used_up(granularity):
    config = dataclasses.replace(PRESETS["default"], granularity=granularity)
    longest = dataclasses.replace(config, curriculum=1.88)  # 2 * 128 / (128 + 8)
    for arm in make_arms(longest):
        assert arm.lengths(arm.num_steps - 1) == 128
    with pytest.raises(ValueError, match=r"Config.curriculum must be at most 1.88, .*, got 3.0"):
        make_arms(dataclasses.replace(config, curriculum=3.0))


def test_seconds_of_a_step_are_medians_and_missing_lengths_lie_between():
    arm = dataclasses.replace(made_up([], {}).arm, lengths=Stages((0, 3, 4), (4, 6, 8)))
    timing = [
        {"step": step, "tokens_per_second": 2 * length / seconds}
        for step, length, seconds in ((1, 4, 1.0), (2, 4, 9.0), (3, 4, 1.0), (5, 8, 2.0))
    ]
    assert report.step_seconds(arm, timing) == {4: 1.0, 6: 1.5, 8: 2.0}
    assert report.step_seconds(arm, []) == {4: 0.0, 6: 0.0, 8: 0.0}


def test_the_papers_setting_is_the_papers_and_can_be_lowered():
    config = PRESETS["paper"]
    assert num_params(config.model.build(config.vocab_size, config.length)) == num_params(
        preset("gpt2-xl")
    )
    small, large, growing = make_arms(config)
    assert (small.batch_size, small.num_steps) == (512, 300_000)
    assert (large.batch_size, large.num_steps) == (4096, 37_500)
    assert large.learning_rate == pytest.approx(6e-4)
    theirs = LinearPacing(min_difficulty=64, max_difficulty=1024, total=45_000, difficulty_step=8)
    coarse = max(np.diff(growing.lengths.values))  # theirs has 121 lengths
    for step in range(0, 60_000, 500):
        assert 0 <= theirs(step + 1) - growing.lengths(step) <= coarse
    mesh = config.mesh.build(jax.devices())
    step = make_step(config, growing.batch_size)
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    with jax.set_mesh(mesh):
        state = jax.eval_shape(lambda: create_state(config, config.vocab_size, 6e-4, 0))
        layout = shardings(state, mesh)
        batch = {
            name: jax.ShapeDtypeStruct(
                (growing.batch_size, growing.lengths(0)), jnp.int32, sharding=batch_sharding(mesh)
            )
            for name in ("input_ids", "labels", "segment_ids", "positions")
        }
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(layout, None))
        lowered = jitted.lower(jax.tree.map(place, state, layout), batch)
    # A device holds an eighth of the model and of Adam's state, or little more.
    held, whole = 0, 0
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(layout), strict=True):
        held, whole = held + math.prod(sharding.shard_shape(leaf.shape)), whole + leaf.size
    assert whole / 8 <= held < whole / 7
    assert lowered.out_info[1]["variance_max"].shape == ()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0"], "Config.seeds must be at least 1, got 0"),
        (["--batch-factor", "1"], "Config.batch_factor must be at least 2, got 1"),
        (
            ["--micro-batch", "3"],
            "Config.micro_batch must be a divisor of batch_size=4, or None, got 3",
        ),
        (
            ["--tokens", "40000"],
            "Config.tokens must be at least 45,056, so that the large batch trains longer than its warmup, got 40000",
        ),
        (["--learning-rate-factors", "4", "4"], "must be one or more different numbers above 0"),
        (
            ["--curriculum", "3"],
            "Config.curriculum must be at most 1.88, so that rows reach the full length before the tokens are used up, got 3.0",
        ),
        (
            ["--min-length", "128"],
            "Config.min_length must be from 1 to below length=128, got 128",
        ),
        (["--threshold", "1"], "Config.threshold must be above 1, got 1.0"),
        (["--model.num-heads", "3"], "num_heads must divide d_model=128, got 3"),
        (["--batch-size", "12"], "a global batch of 12 rows cannot be divided over 8 devices"),
        (["--resume"], "set together with --out"),
        (["--out", "absent", "--resume"], "absent: does not exist. Run without resume"),
    ],
)
def test_a_wrong_option_is_answered_with_what_would_do(words, message, corpus, refused, tmp_path):
    words = [*words, "--corpus", corpus, "--cache", str(tmp_path / "cache")]
    assert message in refused(main, words)
