"""The study seqlen_curriculum: tokens and steps of its arms, a run and one that diverges, signs of instability, wrong options."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from effscale.experiments import seqlen_curriculum
from effscale.experiments.seqlen_curriculum import PRESETS, Config, main, plans, run, signs
from effscale.experiments.shared.gpt import ModelConfig
from effscale.experiments.shared.prepared import Text, prepared_corpora
from effscale.models import num_params, preset
from effscale.parallel import MeshConfig
from effscale.study.command import conduct
from effscale.training import LinearPacing

# By hand: 4096 tokens are 32 steps of 8 rows of 16, and 16 of 16 rows. The curriculum lasts 16 steps, from 8 to 16 tokens,
# in fours: 8 + 8 (b + 1)/16 is 12 at step 7 and 16 at step 15. Those 15 steps take 16 (7 * 8 + 8 * 12) = 2432
# tokens, and 7 more of 256 tokens take the other 1664.
LENGTHS = [8] * 7 + [12] * 8 + [16] * 7
STEPS = {"small": 32, "large_x4": 16, "large_curriculum_x4": len(LENGTHS)}


@pytest.fixture
def config(corpus, tmp_path):
    return Config(
        corpus=(corpus,),
        validation_fraction=0.1,
        cache=tmp_path / "cache",
        out=tmp_path / "run",
        seeds=1,
        vocab_size=320,
        length=16,
        tokens=4096,
        batch_size=8,
        batch_factor=2,
        learning_rate=5e-3,
        learning_rate_factors=(4.0, 1e30),
        warmup=3,
        curriculum=1.0,
        granularity=4,
        model=ModelConfig(num_layers=1, d_model=16, num_heads=2),
        evaluations=2,
        eval_batches=1,
    )


def test_each_arm_consumes_the_tokens_in_the_steps_counted_by_hand(config):
    planned = plans(config)
    for arm, steps in STEPS.items():
        plan = planned[arm]
        lengths = LENGTHS if "curriculum" in arm else [16] * steps
        assert [plan.lengths(step) for step in range(plan.num_steps)] == lengths


def test_a_curriculum_and_a_run_that_diverges(config):
    arms = ("small", "large_curriculum_x4", "large_x1e+30")
    config = dataclasses.replace(config, arms=arms)
    figures = conduct(config, seqlen_curriculum.study).figures

    def records(arm):
        lines = (config.out / arm / "seed-0" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    steps = [record for record in records("large_curriculum_x4") if "loss" in record]
    tokens = 16 * np.cumsum(LENGTHS)
    assert [step["tokens"] for step in steps] == tokens.tolist()
    # The rate rises by steps and falls by tokens.
    before = np.array([0, *tokens[:-1]], float)
    share = np.clip((before - before[3]) / (4096 - before[3]), 0, 1)
    expected = 2e-2 * (0.1 + 0.9 * (1 + np.cos(np.pi * share)) / 2)
    expected[:3] = 2e-2 * np.arange(3) / 3
    np.testing.assert_allclose([step["learning_rate"] for step in steps], expected, rtol=1e-4)
    assert figures["large_curriculum_x4_variance_max"] == max(s["variance_max"] for s in steps[3:])

    # It shares the Run of large_x4, but not its rate.
    assert figures["large_x1e+30_diverged"] == 1
    assert figures["large_x1e+30_val_loss"] is None
    assert figures["large_x1e+30_unstable_steps"] >= 10
    assert records("large_x1e+30")[-1]["skipped_in_row"] == 10

    assert (figures["small_reached"], figures["large_x1e+30_reached"]) == (1, 0)
    assert 0 < figures["small_tokens_to_reach"] <= 4096
    assert figures["small_seconds_to_reach"] > 0
    assert figures["large_x1e+30_tokens_to_reach"] is None


def test_a_large_batch_is_the_small_ones_of_its_seed(config):
    text = Text(*prepared_corpora(config))
    planned = plans(config)
    made = {arm: run(config, planned[arm], text) for arm in STEPS}
    small, large = iter(made["small"].data(1)), iter(made["large_x4"].data(1))
    for _ in range(3):
        whole, parts = next(large), [next(small), next(small)]
        for name, value in whole.items():
            np.testing.assert_array_equal(value, np.concatenate([part[name] for part in parts]))
    other = next(iter(made["small"].data(2)))
    assert not np.array_equal(other["input_ids"], parts[1]["input_ids"])
    growing = made["large_curriculum_x4"]
    assert growing.evaluation.data[0]["input_ids"].shape == (16, 16)  # evaluation sees whole rows
    assert growing.changes.shape_batch(whole, 12)["input_ids"].tolist() == whole["input_ids"][:, :12].tolist()  # fmt: skip


def test_signs_of_instability_are_those_of_the_records(config):
    """Three steps of 8 tokens and three of 16; the third loss is half as high again as the second."""
    config = dataclasses.replace(config, warmup=1, batch_factor=2, batch_size=1, length=8, min_length=4)  # fmt: skip
    tokens = np.cumsum([8, 8, 8, 16, 16, 16]).tolist()

    def records(losses, validation):
        steps = [
            {
                "loss": loss,
                "tokens": n,
                "grad_norm": 9.0 / i,
                "variance_norm": i,
                "variance_max": 1.0,
            }
            for i, (loss, n) in enumerate(zip(losses, tokens, strict=False), 1)
        ]
        return steps + [{"val_loss": loss} for loss in validation]

    found = signs(config, records([4.0, 2.0, 3.0, 2.0, 1.0, 1.1], [3.0, 2.0, 2.2]))
    assert (found["unstable_steps"], found["greatest_loss_ratio"]) == (1, 1.5)
    assert found["greatest_val_loss_ratio"] == pytest.approx(1.1)
    # Windows of 16 tokens: two steps of 8; one of 8 and one of 16 that begins in it; then one of 16 each.
    assert found["greatest_pooled_loss_ratio"] == pytest.approx(1.1)
    # After the warmup of one step; the maximum does not vary.
    assert (found["grad_norm"], found["variance_norm"]) == (4.5, 6)
    expected = np.corrcoef([0.5, 1.5, 1.0, 0.5, 1.1], [2, 3, 4, 5, 6])[0, 1]
    assert found["correlation_variance_norm"] == pytest.approx(expected)
    assert np.isnan(found["correlation_variance_max"])
    broken = signs(config, records([4.0, 5.0, None], []))
    assert broken["unstable_steps"] == 2  # that without a loss, too
    assert broken["greatest_loss_ratio"] == 1.25
    assert np.isnan(broken["greatest_val_loss_ratio"])


@pytest.mark.parametrize("granularity", [1, None, 16])
def test_rows_become_whole_before_the_tokens_are_used_up(granularity):
    longest = dataclasses.replace(PRESETS["default"], granularity=granularity, curriculum=1.88)
    for plan in plans(longest).values():  # 1.88 is 2 * 128 / (128 + 8)
        assert plan.lengths(plan.num_steps - 1) == 128
    with pytest.raises(ValueError, match=r"Config.curriculum must be at most 1.88, .*, got 3.0"):
        dataclasses.replace(longest, curriculum=3.0)


def test_the_papers_setting_is_the_papers_and_can_be_lowered():
    config = PRESETS["paper"]
    small, large, growing = plans(config).values()
    assert (small.batch_size, small.num_steps) == (512, 300_000)
    assert (large.batch_size, large.num_steps) == (4096, 37_500)
    theirs = LinearPacing(min_difficulty=64, max_difficulty=1024, total=45_000, difficulty_step=8)
    coarse = max(np.diff(growing.lengths.values))  # theirs has 121 lengths
    for step in range(0, 60_000, 500):
        assert 0 <= theirs(step + 1) - growing.lengths(step) <= coarse
    described = dataclasses.replace(run(config, growing), mesh=MeshConfig(fsdp=8))
    assert num_params(described.model) == num_params(preset("gpt2-xl"))
    rows = jax.ShapeDtypeStruct((4096, 1024), "int32")
    batch = dict.fromkeys(("input_ids", "labels", "segment_ids", "positions"), rows)
    lowered = described.lower(batch=batch, stage=0)
    assert lowered.in_tree.num_leaves
    assert lowered.out_info[1]["variance_max"].shape == ()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-factor", "1"], "Config.batch_factor must be at least 2, got 1"),
        (
            ["--micro-batch", "3"],
            "Config.micro_batch must be a divisor of batch_size=4, or None, got 3",
        ),
        (
            ["--tokens", "40000"],
            "Config.tokens must be at least 45,056, so that the large batch trains longer than its warmup, got 40000",
        ),
        (["--learning-rate-factors", "4", "4"], "must be one or more different numbers"),
        (
            ["--curriculum", "3"],
            "Config.curriculum must be at most 1.88, so that rows reach the full length before the tokens are used up, got 3.0",
        ),
        (["--min-length", "128"], "Config.min_length must be below length=128, got 128"),
        (["--batch-size", "12"], "a global batch of 12 rows cannot be divided over 8 devices"),
    ],
)
def test_a_wrong_option_is_answered_with_what_would_do(words, message, corpus, refused, tmp_path):
    words = [*words, "--corpus", corpus, "--cache", str(tmp_path / "cache")]
    assert message in refused(main, words)
