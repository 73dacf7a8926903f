"""Modules are plain pytrees: what JAX, optax and the strictest mode of NNX do with them."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effscale.models import Transformer
from effscale.parallel import DEFAULT_RULES

PROGRAM = """
import dataclasses, jax, jax.numpy as jnp, optax
from flax import nnx
from effscale.models import Transformer, add_lora, bert, bert_pretraining_heads, empty_cache, gpt2, merge_lora, num_params, unroll, vit
size = dict(num_layers=2, d_model=16, num_heads=2)
model = jax.jit(lambda: Transformer(gpt2(**size, vocab_size=20, max_length=8), rngs=nnx.Rngs(0)))()
ids = jnp.zeros((1, 4), jnp.int32)
loss = jax.jit(jax.value_and_grad(lambda m: jax.nn.logsumexp(m(ids), -1).sum()))
before, grads = loss(model)
updates, _ = optax.adam(1e-2).update(grads, optax.adam(1e-2).init(model))
assert loss(optax.apply_updates(model, updates))[0] < before
adapted = merge_lora(add_lora(model, rank=2, key=jax.random.key(0)))
run = jax.jit(lambda m, ids: m(ids))
assert jnp.allclose(run(adapted, ids), run(model, ids), atol=1e-5)
flat = unroll(model)
hidden = jax.jit(lambda m: m.encode(ids, cache=empty_cache(m.config, 1, 8)).hidden)
assert jnp.allclose(hidden(flat), hidden(model), atol=1e-5)
config = bert(**size, vocab_size=20, max_length=8, heads=bert_pretraining_heads())
encoder = jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()
assert set(run(encoder, ids)) == {"hidden", "pooled", "mlm", "nsp"}
assert num_params(vit(**size, image_size=8, patch_size=4)) > 0
print("done")
"""


def test_a_process_of_its_own_in_tree_mode():
    """NNX's strictest mode, without the test suite's own settings."""
    flags = {"NNX_GRAPH_MODE": "false", "NNX_GRAPH_UPDATES": "false"}
    cache = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    run = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", PROGRAM],
        env=os.environ | flags | cache,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == ["done"]


def test_leaves_are_float_arrays_without_random_state(family, tiny):
    model = tiny(family)
    assert all(
        isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(model)
    )
    modules = [module for _, module in nnx.iter_modules(model)]
    assert not any(isinstance(module, (nnx.Rngs, nnx.RngStream, nnx.Dropout)) for module in modules)
    assert len({id(module) for module in modules}) == len(modules)


def test_every_parameter_has_logical_axes(family, tiny):
    for path, param in nnx.to_flat_state(nnx.state(tiny(family))):
        stacked = path[0] == "groups"
        axes = param.get_metadata("axes")
        assert len(axes) == param.get_value().ndim - stacked, path
        assert all(name is None or name in DEFAULT_RULES for name in axes), path


def test_a_round_trip_through_flatten_keeps_config_and_axes(family, tiny):
    model = tiny(family)
    leaves, tree = jax.tree.flatten(model)
    again = jax.tree.unflatten(tree, leaves)
    assert again.config == model.config
    assert jax.tree.structure(again) == tree
    hash(tree)  # what `jax.jit` looks compiled programs up by


def test_initialization_depends_on_the_key_only(tiny):
    config = tiny("gptj").config
    make = jax.jit(lambda key: Transformer(config, rngs=nnx.Rngs(params=key)))
    one, same, other = (make(jax.random.key(seed)) for seed in (0, 0, 1))
    equal = lambda a, b: all(
        jnp.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
    assert equal(one, same)
    assert not equal(one, other)
    eager = Transformer(config, rngs=nnx.Rngs(params=jax.random.key(0)))
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_gradient_descent_on_the_module_itself(tiny, tokens):
    model = tiny("llama")
    ids = tokens(model.config, 4, 8)

    @jax.jit
    def step(model):
        def loss(model):
            log_p = jax.nn.log_softmax(model(ids[:, :-1]))
            return -jnp.take_along_axis(log_p, ids[:, 1:, None], 2).mean()

        value, grads = jax.value_and_grad(loss)(model)
        return jax.tree.map(lambda w, g: w - 0.3 * g, model, grads), value

    losses = []
    for _ in range(12):
        model, value = step(model)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
