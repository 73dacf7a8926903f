"""Decoding with experts: the same tokens as without a cache, and only the chosen experts are read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effscale.generation import SamplingConfig, decode
from effscale.models import MLPConfig, Transformer, gpt2, unroll
from effscale.models.context import build_context
from effscale.models.stacking import for_decoding
from effscale.moe import MoEConfig, RouterConfig, with_experts
from effscale.parallel import MeshConfig, shard
from effscale.quant import quantize_model, w8a8

GREEDY = SamplingConfig(max_new_tokens=6, temperature=0.0)

ALL = RouterConfig(k=2, capacity_factor=None, eval_capacity_factor=None)


def make(num_experts=8, router=ALL, **changes):
    dense = gpt2(num_layers=2, d_model=16, num_heads=2, vocab_size=23, max_length=32)
    moe = MoEConfig(num_experts=num_experts, expert=MLPConfig(d_ff=16), router=router, **changes)
    config = dataclasses.replace(with_experts(dense, moe), init_std=0.5)
    return jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()


@pytest.mark.parametrize(("rows", "groups"), [(1, None), (3, None), (2, 2)])
def test_greedy_tokens_are_those_of_the_whole_sequence(rows, groups):
    """One row decodes expert by expert, three go through all experts, and so do two in groups of their own."""
    model = make(shared=MLPConfig(d_ff=8), groups=groups)
    prompt = jnp.asarray(np.random.default_rng(0).integers(0, 23, (rows, 5)), jnp.int32)
    done = decode(model, prompt, GREEDY, log_probs=True)
    logits = jax.jit(lambda m, ids: m(ids))(model, done.tokens[:, :-1])[:, 4:]
    np.testing.assert_array_equal(done.tokens[:, 5:], logits.argmax(-1))
    expected = jax.nn.log_softmax(logits).max(-1)
    np.testing.assert_allclose(done.log_probs, expected, atol=1e-4)


def test_decoding_drops_nothing():
    """A capacity would let the other rows of a batch decide what a row says."""
    model = make(router=RouterConfig(k=1, eval_capacity_factor=0.5, min_capacity=0))
    prompt = jnp.asarray(np.random.default_rng(0).integers(0, 23, (8, 5)), jnp.int32)
    together = decode(model, prompt, GREEDY).tokens
    np.testing.assert_array_equal(together[:1], decode(model, prompt[:1], GREEDY).tokens)


@pytest.mark.parametrize("mesh", [{"data": 1, "expert": 4}, {"data": 2, "expert": 2}], ids=str)
def test_generation_on_devices_that_share_the_experts(mesh):
    """The same tokens as on one device, of float and of packed experts."""
    prompt = jnp.asarray(np.random.default_rng(0).integers(0, 23, (4, 5)), jnp.int32)
    for model in (make(), quantize_model(make(), w8a8())):
        alone = decode(model, prompt, GREEDY).tokens
        devices = MeshConfig(**mesh).build(jax.devices()[:4])
        with jax.set_mesh(devices):
            np.testing.assert_array_equal(
                decode(shard(model, devices), prompt, GREEDY).tokens, alone
            )


def test_experts_apart_compute_the_same_as_the_stack():
    model = unroll(make())
    layer = model.groups[-1].blocks[-1].feed_forward
    first = lambda module: jax.tree.map(lambda a: a[0], module)
    apart = first(layer.for_decoding())
    assert len(apart.experts["apart"]) == 8
    x = jax.random.normal(jax.random.key(0), (3, 1, 16))
    context = build_context(1, kind=None, head_dim=8, causal=True, valid=jnp.ones((3, 1), bool))
    rest = dataclasses.replace(context, valid=jnp.array([[True], [False], [True]]))
    one = dataclasses.replace(context, valid=context.valid[:1])
    for given, rows in ((context, 3), (rest, 3), (one, 1)):
        run = jax.jit(lambda m, x, given=given: m(x, given)[0])
        np.testing.assert_allclose(run(apart, x[:rows]), run(first(layer), x[:rows]), atol=1e-5)


def test_one_token_reads_only_what_it_needs():
    """The program of a token has a branch for each expert in place of products over all of them."""
    model = for_decoding(unroll(make()))
    layer = jax.tree.map(lambda a: a[0], model.groups[-1].blocks[-1].feed_forward)
    context = build_context(1, kind=None, head_dim=8, causal=True)
    lower = lambda x: jax.jit(lambda m, x: m(x, context)[0]).lower(layer, x).as_text()
    one, many = lower(jnp.ones((1, 1, 16))), lower(jnp.ones((8, 1, 16)))
    assert one.count("stablehlo.case") == 1
    assert "8x16x16xf32" not in one
    assert "8x16x16xf32" in many


def test_quantized_experts():
    """A scale for each output of each expert; decoding reads the codes of the chosen ones."""
    model = make()
    small = quantize_model(model, w8a8())
    kernel = small.groups[-1].blocks[-1].feed_forward.experts.up.kernel.get_value()
    assert kernel.shape == (1, 8, 16, 16)
    assert kernel.data.dtype == jnp.int8
    prompt = jnp.array([[3, 1, 4, 1, 5]], jnp.int32)
    done = decode(small, prompt, GREEDY)
    logits = jax.jit(lambda m, ids: m(ids))(small, done.tokens[:, :-1])[:, 4:]
    np.testing.assert_array_equal(done.tokens[:, 5:], logits.argmax(-1))
    own = jax.jit(lambda m, ids: m(ids))(model, done.tokens)
    error = jax.jit(lambda m, ids: m(ids))(small, done.tokens) - own
    assert jnp.linalg.norm(error) < 0.05 * jnp.linalg.norm(own)
