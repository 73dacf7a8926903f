"""The same parameters under another config."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effscale.models import Transformer, add_lora, gpt2, unroll, with_config

CONFIG = gpt2(num_layers=2, d_model=16, num_heads=2, vocab_size=50, max_length=8)
IDS = jnp.array([[3, 1, 4, 1]])


@pytest.fixture(scope="module")
def model():
    return jax.jit(lambda: Transformer(CONFIG, rngs=nnx.Rngs(0)))()


@pytest.mark.parametrize("change", [add_lora, lambda model, **_: unroll(model)])
def test_layers_are_recomputed_and_nothing_else_changes(model, change):
    """Low-rank pairs and layers that are apart stay what they are."""
    given = change(model, rank=2, key=jax.random.key(1)) if change is add_lora else change(model)
    lean = with_config(given, dataclasses.replace(given.config, remat="full"))
    gradient = jax.grad(lambda model: jax.nn.log_softmax(model(IDS)).sum())
    assert "remat" in str(jax.make_jaxpr(gradient)(lean))
    assert "remat" not in str(jax.make_jaxpr(gradient)(given))
    for a, b in zip(*(jax.tree.leaves(gradient(m)) for m in (lean, given)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert given.config.remat == "none"


def test_it_computes_in_another_type(model):
    lean = with_config(model, dataclasses.replace(CONFIG, dtype="bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(lean)} == {jnp.dtype("float32")}
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (lean, model)), strict=True))
    logits = lean(IDS)
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits.astype(jnp.float32), model(IDS), atol=0.02)


def test_other_parameters_are_refused(model):
    wider = gpt2(num_layers=2, d_model=32, num_heads=2, vocab_size=50, max_length=8)
    with pytest.raises(ValueError, match=r"embedding \(\(50, 16\), not \(50, 32\)\)"):
        with_config(model, wider)
    with pytest.raises(ValueError, match="must have the parameters of the model, but"):
        with_config(unroll(model), CONFIG)
