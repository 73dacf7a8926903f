"""The study random_ltd_vit: two steps of both arms, what layers see, the paper's setting, and wrong options."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effscale.experiments import random_ltd_vit
from effscale.experiments.random_ltd_vit import PRESETS, Config, main
from effscale.experiments.shared.classifier.model import classifier_config
from effscale.experiments.shared.classifier.recipe import Recipe
from effscale.experiments.shared.dropping import Dropping
from effscale.interop import save_pretrained
from effscale.models import Transformer, vit
from effscale.study.command import conduct


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


def small_vit(layers=4, size=16):
    return vit(
        num_layers=layers, d_model=16, num_heads=2, image_size=size, patch_size=4, num_classes=None
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small random ViT, and images in Fashion-MNIST's files."""
    place = tmp_path_factory.mktemp("random_ltd_vit")
    save_pretrained(Transformer(small_vit(), rngs=nnx.Rngs(0)), place / "image")
    chance = np.random.default_rng(0)
    (place / "fashion").mkdir()
    for split, count in (("train", 32), ("t10k", 10)):
        images, labels = chance.integers(0, 256, (count, 8, 8)), chance.integers(0, 4, count)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            (place / "fashion" / f"{split}-{kind}-ubyte").write_bytes(idx(array))
    return place


def test_both_arms_get_the_same_images_and_warmup(place, tmp_path):
    """The whole study in two steps of 10 tokens an image: the first keeps 4 in the middle layers, the second all."""
    config = Config(
        seeds=1,
        fashion=Recipe(epochs=1, batch_size=16, learning_rate=1e-2),
        image_size=12,
        image_model=place / "image",
        fashion_mnist=place / "fashion",
        ltd=Dropping(min_value=4, seq_per_step=3, share=0.5),
        eval_batches=1,
        out=tmp_path / "run",
    )
    figures = conduct(config, random_ltd_vit.study).figures
    steps = {}
    for arm in ("baseline", "random_ltd"):
        lines = (tmp_path / "run" / arm / "seed-0/metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert figures[f"{arm}_accuracy"] == records[-1]["test_accuracy"]
        steps[arm] = [record for record in records if "loss" in record]
    assert [record["tokens"] for record in steps["baseline"]] == [160, 320]
    assert [record["tokens"] for record in steps["random_ltd"]] == [112, 272]
    assert steps["baseline"][0]["loss"] != steps["random_ltd"][0]["loss"]
    # It decays by layer tokens, of which the first step with random-LTD consumes fewer.
    for arm, share in {"baseline": 160 / 320, "random_ltd": 112 / 272}.items():
        rates = [record["learning_rate"] for record in steps[arm]]
        np.testing.assert_allclose(rates, [1e-2, 1e-2 * (1 - share)], rtol=1e-5)
    assert figures["layer_tokens_saved"] == pytest.approx(1 - 272 / 320)
    # Multiplications of a layer on n tokens: four projections of 16 x 16, two of 16 x 64, scores and mixing.
    layer = lambda n: n * (4 * 16 * 16 + 2 * 16 * 64) + 2 * 16 * n**2
    flops = lambda kept: 6 * 16 * (9 * 4 * 4 * 3 * 16 + 2 * layer(10) + 2 * layer(kept))
    assert figures["random_ltd_teraflops"] == pytest.approx((flops(4) + flops(10)) / 1e12)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "digit"], "invalid choice 'digit'"),
        (["--eval-every", "0"], "Config.eval_every must be at least 1, got 0"),
        (["--ltd.share", "1.5"], "Dropping.share must be above 0 and at most 1, got 1.5"),
        (
            ["--ltd.min-value", "11"],
            "Dropping.min_value must be at most the 10 tokens of a row, got 11",
        ),
        (["--fashion.train", "33"], "fashion.train must be at most 32"),
        (["--image-size", "9"], "must be a multiple of patch_size=4"),
        (["--fashion-mnist", "absent"], "apt-get install dataset-fashion-mnist"),
        (["--image-model", "two"], "leaves none of 2. Use a model with at least 3 layers"),
    ],
)
def test_a_wrong_option_is_answered_with_what_would_do(words, message, place, refused, tmp_path):
    if "two" in words:
        save_pretrained(Transformer(small_vit(2), rngs=nnx.Rngs(0)), tmp_path / "two")
    options = [
        *("--image-size", "12", "--fashion.train", "None", "--fashion.test", "None"),
        *("--image-model", str(place / "image"), "--fashion-mnist", str(place / "fashion")),
    ]
    assert message in refused(main, [*options, *words])


def test_the_papers_setting_lowers():
    """A layer that drops tokens between two that do not, with the paper's shapes."""
    config = PRESETS["paper"]
    rows, size = config.recipe.batch_size, config.image_size
    model = classifier_config(vit(num_layers=3, d_model=384, num_heads=6, image_size=size), 10)
    plan = random_ltd_vit.plan(config, "random_ltd", model, 60_000 // rows * config.recipe.epochs)
    assert (plan.stages.values[0], plan.stages.values[-1]) == (32, 197)
    batch = {
        "images": jax.ShapeDtypeStruct((rows, size, size, 3), jnp.float32),
        "labels": jax.ShapeDtypeStruct((rows,), jnp.int32),
        "weights": jax.ShapeDtypeStruct((rows,), jnp.float32),
    }
    assert "32x384" in random_ltd_vit.run(config, plan).lower(batch=batch, stage=0).as_text()
