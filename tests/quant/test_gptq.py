"""GPTQ against a plain NumPy version, and on models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effscale.models import Transformer, by_layer, llama
from effscale.quant import Format, Recipe, Rule, gptq, input_grams, quantize, quantize_model

RNG = np.random.default_rng(0)
X = (RNG.normal(size=(300, 24)) @ RNG.normal(size=(24, 24))).astype(np.float32)
KERNEL = RNG.normal(size=(24, 5)).astype(np.float32)
GRAM = X.T @ X


def reference(kernel, gram, bits, damping=0.01, group=None):
    """Row by row in float64, symmetric and narrow, from the paper."""
    w, d_in = kernel.astype(np.float64).copy(), len(kernel)
    h = gram.astype(np.float64) + damping * np.diag(gram).mean() * np.eye(d_in)
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    most = 2 ** (bits - 1) - 1
    codes, scale = np.zeros_like(w), np.abs(w).max(0) / most
    for i in range(d_in):
        if group and i % group == 0:
            scale = np.abs(w[i : i + group]).max(0) / most
        codes[i] = np.clip(np.round(w[i] / scale), -most, most)
        error = (w[i] - codes[i] * scale) / u[i, i]
        w[i + 1 :] -= np.outer(u[i, i + 1 :], error)
    return codes


def error_of(found):
    return np.linalg.norm(X @ np.asarray(found.values()) - X @ KERNEL)


@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_numpy_agrees(bits, group):
    if group is None:
        format = Format(bits=bits)
    else:
        format = Format(bits=bits, granularity="group", group_size=group)
    found = jax.jit(lambda k, g: gptq(k, g, format))(KERNEL, GRAM)
    expected = reference(KERNEL, GRAM, bits, group=group)
    # One code that falls the other way in float32 changes those after it.
    assert np.mean(np.asarray(found.codes) != expected) < 0.03
    assert error_of(found) < 0.9 * error_of(quantize(jnp.asarray(KERNEL), format))


@pytest.mark.parametrize(
    "format",
    [Format(bits=4, symmetric=False), Format(bits=4, granularity="tensor")],
    ids=Format.describe,
)
def test_other_formats_lose_less_too(format):
    found = gptq(jnp.asarray(KERNEL), jnp.asarray(GRAM), format)
    nearest = quantize(jnp.asarray(KERNEL), format)
    assert found.scale.shape == nearest.scale.shape
    assert error_of(found) < 0.8 * error_of(nearest)


def test_inputs_that_never_came_do_no_harm():
    gram = GRAM.copy()
    gram[3], gram[:, 3] = 0.0, 0.0
    values = gptq(jnp.asarray(KERNEL), jnp.asarray(gram), Format(bits=4)).values()
    assert bool(jnp.isfinite(values).all())
    bad = jnp.asarray(gram).at[5, 5].set(jnp.nan)
    lost = gptq(jnp.asarray(KERNEL), bad, Format(bits=4)).values()
    assert bool(jnp.isnan(lost).all())
    nothing = gptq(jnp.asarray(KERNEL), jnp.zeros((24, 24)), Format(bits=4)).values()
    np.testing.assert_allclose(nothing, quantize(jnp.asarray(KERNEL), Format(bits=4)).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"format": Format(bits=2)},
            "format must be integers of 3, 4 or 8 bits .*, got ternary, per channel",
        ),
        ({"format": Format(granularity="block", num_blocks=5)}, "for GPTQ, got int8"),
        ({"format": Format(bits=4, granularity="group", group_size=7)}, "7 does not divide 24"),
        ({"format": Format(), "damping": 0.0}, "damping must be positive, got 0.0"),
    ],
)
def test_what_it_cannot_do(options, message):
    with pytest.raises(ValueError, match=message):
        gptq(**{"kernel": jnp.asarray(KERNEL), "gram": jnp.asarray(GRAM)} | options)


def test_a_gram_matrix_of_another_kernel(unchecked):
    with pytest.raises(ValueError, match=r"kernel and gram must have shapes .* \(5, 5\)"):
        gptq(jnp.asarray(KERNEL), jnp.ones((5, 5)), Format())


@pytest.fixture(scope="module")
def model():
    config = llama(num_layers=3, d_model=32, num_heads=2, d_ff=48, vocab_size=64)
    return Transformer(config, rngs=nnx.Rngs(0))


def batch(seed, length=16):
    ids = np.random.default_rng(seed).integers(0, 64, (8, length)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[0, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("normalize", [False, True])
def test_grams_are_those_of_the_inputs(model, normalize):
    """Of every dense layer, over batches, without the padding; of rows of one size where wanted."""
    batches = [batch(1), batch(2)]
    found = input_grams(model, batches, normalize=normalize)
    assert len(found) == 3 * 7
    points = ("attention_in", "attention_mixed", "feed_forward_in", "feed_forward_inner")
    readers = ("attention.value", "attention.out", "feed_forward.gate", "feed_forward.down")
    encode = jax.jit(lambda model, b: model.encode(inputs=b["input_ids"], attention_mask=b["attention_mask"], capture=points).captured)  # fmt: skip
    seen = [encode(model, b) for b in batches]
    for point, reader in zip(points, readers, strict=True):
        for layer in range(3):
            rows = [
                np.asarray(by_layer(s, point)[layer])[b["attention_mask"] == 1]
                for s, b in zip(seen, batches, strict=True)
            ]
            rows = np.concatenate(rows).astype(np.float64)
            if normalize:
                rows /= np.sqrt(np.mean(rows**2, -1, keepdims=True))
            name = f"layers.{layer}.{reader}.kernel"
            np.testing.assert_allclose(found[name], rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_a_model_rounded_by_its_inputs_is_nearer(model):
    """Layers of other bits among them; the head, which has no matrix of inputs, is rounded to the nearest."""
    recipe = Recipe(
        (
            Rule(where=r"layers\.0\..*kernel", weights=Format(bits=8)),
            Rule(
                where=r"layers\..*kernel",
                weights=Format(bits=3, granularity="group", group_size=16),
            ),
            Rule(where=r"heads\.lm", weights=Format(bits=8)),
        )
    )
    grams = input_grams(model, [batch(seed) for seed in range(4)])
    run = jax.jit(lambda model, ids: model(ids))
    ids = batch(9)["input_ids"]
    exact = run(model, ids)
    error = lambda m: float(jnp.linalg.norm(run(m, ids) - exact))
    assert error(quantize_model(model, recipe, grams=grams)) < 0.9 * error(
        quantize_model(model, recipe)
    )
    with pytest.raises(ValueError, match="batches must not be empty"):
        input_grams(model, [])
    name = "layers.2.attention.query.kernel"
    with pytest.raises(
        ValueError, match=rf"grams must have an entry for {name}, which is in the same stack"
    ):
        quantize_model(model, recipe, grams={n: g for n, g in grams.items() if n != name})
    with pytest.raises(
        ValueError, match="grams belongs to another model: this model has no weight other"
    ):
        quantize_model(model, recipe, grams=grams | {"other": grams[name]})
    broken = grams | {name: grams[name] * jnp.nan}
    with pytest.raises(
        ValueError, match=r"attention\.query\.kernel: .*Gram matrix of its inputs are not finite"
    ):
        quantize_model(model, recipe, grams=broken)
