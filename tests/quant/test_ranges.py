"""Static calibration: the scales of inputs, found once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effscale.models import Transformer, by_layer, gpt2
from effscale.quant import Format, Recipe, Rule, input_ranges, quantize_model, w8a8
from effscale.quant.inputs import InputRange

CONFIG = gpt2(num_layers=2, d_model=32, num_heads=2, vocab_size=64, max_length=16)
LAYERS = r"layers\..*kernel"
run = jax.jit(lambda model, ids: model(ids))


@pytest.fixture(scope="module")
def model():
    return Transformer(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def batches():
    made = []
    for seed in range(3):
        ids = np.random.default_rng(seed).integers(0, 64, (4, 16)).astype(np.int32)
        mask = np.ones_like(ids)
        mask[0, 8:] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def recipe(**options):
    inputs = Format(granularity="tensor", **options)
    return Recipe((Rule(where=LAYERS, weights=Format(), activations=inputs),))


def test_ranges_move_from_batch_to_batch(model, batches):
    """By hand: the first batch's, then 0.9 of the old and 0.1 of the new; padding has no say."""
    found = input_ranges(model, batches, momentum=0.9)
    points = {"attention_in": "attention.key", "feed_forward_inner": "feed_forward.down"}
    encode = jax.jit(lambda m, ids, mask: m.encode(ids, attention_mask=mask, capture=tuple(points)).captured)  # fmt: skip
    for point, reader in points.items():
        for layer in range(2):
            expected = None
            for batch in batches:
                seen = encode(model, batch["input_ids"], batch["attention_mask"])
                rows = np.asarray(by_layer(seen, point)[layer])[batch["attention_mask"] == 1]
                ends = np.array([rows.min(), rows.max()])
                expected = ends if expected is None else 0.9 * expected + 0.1 * ends
            low, high = found[f"layers.{layer}.{reader}.kernel"]
            np.testing.assert_allclose([low, high], expected, rtol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_model_computes_with_the_calibrated_scales(model, batches, symmetric):
    """Where the ranges are those of the very input, static and dynamic scales are the same."""
    ids = batches[0]["input_ids"]
    ranges = input_ranges(model, [{"input_ids": ids}])
    static = quantize_model(model, recipe(symmetric=symmetric), ranges=ranges)
    dynamic = quantize_model(model, recipe(symmetric=symmetric))
    exact = run(model, ids)
    error = lambda m: float(jnp.linalg.norm(run(m, ids) - exact) / jnp.linalg.norm(exact))
    assert 0 < error(static) < 0.03
    assert error(static) == pytest.approx(error(dynamic), rel=0.5)
    weight = static.groups[0].blocks[0].attention.query.kernel.get_value()
    assert weight.input_scale.shape == (2,)
    assert (weight.input_zero is None) == symmetric
    # What it computes with its inputs it does not look for in them.
    reductions = lambda m: run.lower(m, ids).as_text().count("stablehlo.reduce")
    assert reductions(static) < reductions(dynamic)


def test_inputs_beyond_the_range_are_cut(model, batches):
    """A range that is too narrow shows as an error, not as numbers that went round."""
    ids = batches[0]["input_ids"]
    wide = input_ranges(model, [{"input_ids": ids}])
    narrow = {name: InputRange(r.low / 50, r.high / 50) for name, r in wide.items()}
    exact, found = run(model, ids), run(quantize_model(model, recipe(), ranges=narrow), ids)
    assert bool(jnp.isfinite(found).all())
    distance = float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))
    assert 0.05 < distance < 2


def test_what_is_asked_for_in_vain(model, batches):
    ranges = input_ranges(model, batches[:1])
    with pytest.raises(ValueError, match="no rule quantizes inputs per tensor"):
        quantize_model(model, w8a8(), ranges=ranges)
    with pytest.raises(
        ValueError, match=r"layers\.0\.attention\.key\.kernel: ranges must have an entry for it"
    ):
        quantize_model(model, recipe(), ranges={})
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1\.0"):
        input_ranges(model, batches, momentum=1.0)
    with pytest.raises(ValueError, match="batches must not be empty"):
        input_ranges(model, [])
