"""Layer-by-layer distillation."""

import jax
import numpy as np
import pytest
from flax import nnx

from effscale.models import Transformer, bert, gpt2, take_layers
from effscale.quant import (
    LKD,
    Format,
    Recipe,
    Rule,
    distill_layers,
    fake_quantize_model,
    quantize_model,
)

TOKENS = Format(granularity="token")
RECIPE = Recipe((Rule(where=r"layers\..*kernel", weights=Format(bits=3), activations=TOKENS),))
run = jax.jit(lambda model, batch: model.encode(batch["input_ids"], attention_mask=batch["attention_mask"]).hidden)  # fmt: skip


def batches(count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        ids = rng.integers(0, 64, (8, 16)).astype(np.int32)
        mask = np.ones_like(ids)
        mask[:2, 10:] = 0
        yield {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module", params=[pytest.param("gpt2", marks=pytest.mark.slow), "bert"])
def taught(request):
    family = {"gpt2": gpt2, "bert": bert}[request.param]
    config = family(num_layers=3, d_model=32, num_heads=2, vocab_size=64, max_length=16)
    # Weights as large as trained ones, so that layers do something.
    scale = lambda x: x * 5 if x.ndim == 3 else x
    teacher = jax.tree.map(scale, Transformer(config, rngs=nnx.Rngs(0)))
    student = fake_quantize_model(teacher, RECIPE)
    found = distill_layers(teacher, student, list(batches(4)), LKD(steps=40, learning_rate=2e-3))
    return teacher, student, found


def test_every_layer_learns(taught):
    _, _, found = taught
    assert found.losses.shape == (3, 40)
    assert (found.losses[:, -4:].mean(1) < 0.8 * found.losses[:, :4].mean(1)).all()


def test_the_model_is_nearer_to_its_teacher(taught):
    """Also packed, and on tokens that it was not taught with."""
    teacher, student, found = taught
    *_, batch = batches(6)
    real = batch["attention_mask"] == 1
    exact = np.asarray(run(teacher, batch))[real]
    error = lambda model: np.linalg.norm(np.asarray(run(model, batch))[real] - exact)
    assert error(found.model) < 0.9 * error(student)
    packed = quantize_model(found.model, RECIPE)
    assert error(packed) == pytest.approx(error(found.model), rel=0.05)


def test_nothing_else_changes(taught):
    _, student, found = taught
    before, after = (take_layers(m, [0]) for m in (student, found.model))
    for name in ("embed", "final_norm"):
        one, other = getattr(before, name), getattr(after, name)
        jax.tree.map(np.testing.assert_array_equal, one, other)
    assert jax.tree.structure(student) == jax.tree.structure(found.model)


def test_padding_does_not_count(taught):
    teacher, student, _ = taught
    (batch,) = batches(1)
    other = dict(batch, input_ids=np.where(batch["attention_mask"] == 1, batch["input_ids"], 7))
    config = LKD(steps=2, learning_rate=1e-3)
    one, two = (distill_layers(teacher, student, [b], config).losses for b in (batch, other))
    np.testing.assert_allclose(one, two, rtol=1e-5)


def test_layers_on_devices_of_their_own_learn_the_same(taught):
    """Two at a time where they are alike; the first, of other bits, alone."""
    teacher, _, _ = taught
    config, lessons = LKD(steps=3, learning_rate=1e-3), list(batches(2))
    first = Rule(where=r"layers\.0\..*kernel", weights=Format(bits=8), activations=TOKENS)
    student = fake_quantize_model(teacher, Recipe((first, *RECIPE.rules)))
    alone = distill_layers(teacher, student, lessons, config)
    together = distill_layers(teacher, student, lessons, config, devices=jax.devices()[:2])
    np.testing.assert_allclose(together.losses, alone.losses, rtol=1e-4)
    for one, other in zip(*map(jax.tree.leaves, (alone.model, together.model)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_taught(taught):
    teacher, student, _ = taught
    with pytest.raises(ValueError, match="the teacher's number of layers, 3, got 2"):
        distill_layers(teacher, take_layers(student, [0, 1]), list(batches(1)))
    with pytest.raises(ValueError, match="no fake-quantized layer"):
        distill_layers(teacher, teacher, list(batches(1)))
    with pytest.raises(ValueError, match="batches must not be empty"):
        distill_layers(teacher, student, [])
    with pytest.raises(ValueError, match="devices must not be empty"):
        distill_layers(teacher, student, list(batches(1)), devices=[])
    with pytest.raises(ValueError, match=r"LKD\.steps must be at least 1.*, got 0"):
        LKD(steps=0)
