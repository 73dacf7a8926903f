"""Training with experts: upcycling, balance by a bias, a router that collapses, and gradients that are not finite."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effscale.models import MLPConfig, Transformer, gpt2
from effscale.moe import (
    MoEConfig,
    RouterConfig,
    RouterWatch,
    upcycle,
    with_balance_bias,
    with_experts,
)
from effscale.training import (
    MultiWriter,
    create_train_state,
    make_train_step,
    next_token_loss,
)

IDS = jnp.asarray(np.random.default_rng(0).integers(0, 23, (8, 17)), jnp.int32)
BATCH = {"input_ids": IDS[:, :-1], "labels": IDS[:, 1:]}
DENSE = gpt2(num_layers=4, d_model=16, num_heads=2, vocab_size=23, max_length=16)
ALL = RouterConfig(k=2, capacity_factor=None, eval_capacity_factor=None)


def make(moe, **layout):
    config = dataclasses.replace(with_experts(DENSE, moe, **layout), init_std=0.3)
    return jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()


@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_upcycled_model_begins_where_the_dense_one_ended(shared):
    dense = jax.jit(
        lambda: Transformer(dataclasses.replace(DENSE, init_std=0.3), rngs=nnx.Rngs(0))
    )()
    mlp = DENSE.blocks[0].feed_forward
    moe = MoEConfig(num_experts=4, expert=mlp, router=ALL, shared=mlp if shared else None)
    sparse = upcycle(dense, moe, [2, 4], rngs=nnx.Rngs(1))
    run = jax.jit(lambda m: m(IDS[:, :16]))
    np.testing.assert_allclose(run(sparse), run(dense), atol=1e-5)
    kernel = sparse.groups[1].blocks[0].feed_forward.experts.up.kernel
    assert kernel.get_metadata()["axes"] == ("experts", "embed", "mlp")
    # The step trains experts apart from each other, and the dense model is untouched.
    optimizer = optax.sgd(0.1)
    state = create_train_state(sparse, optimizer, key=jax.random.key(0))
    state, _ = jax.jit(make_train_step(next_token_loss, optimizer))(state, BATCH)
    kernel = state.model.groups[-1].blocks[-1].feed_forward.experts.up.kernel.get_value()
    assert np.ptp(np.asarray(kernel), axis=1).max() > 0


def test_upcycling_needs_experts_of_the_models_own_kind():
    dense = jax.eval_shape(lambda: Transformer(DENSE, rngs=nnx.Rngs(0)))
    with pytest.raises(
        ValueError,
        match=r"MoEConfig.expert must be the feed-forward of layers \[1, 3\], .*got .*d_ff=8",
    ):
        upcycle(dense, MoEConfig(num_experts=2, expert=MLPConfig(d_ff=8)), rngs=nnx.Rngs(1))


def test_a_bias_evens_the_load():
    """Its steps have the sign of what an expert has too little; nothing else of the model sees it."""
    router = RouterConfig(
        k=1, balance=0.0, balance_by_bias=True, score="sigmoid", capacity_factor=None
    )
    model = make(
        MoEConfig(num_experts=4, expert=MLPConfig(d_ff=8), router=router), num_experts=[4, 0]
    )
    optimizer = with_balance_bias(optax.sgd(0.0), 0.05)
    step = jax.jit(make_train_step(next_token_loss, optimizer))
    state = create_train_state(model, optimizer, key=jax.random.key(0))
    bias = lambda s: np.asarray(
        s.model.groups[1].blocks[0].feed_forward.router.balance_bias.get_value()
    )[0]
    loads = []
    for _ in range(30):
        before = bias(state)
        state, metrics = step(state, BATCH)
        loads.append(np.asarray(metrics["load"]))
        np.testing.assert_allclose(
            bias(state) - before, -0.05 * np.sign(np.round(loads[-1] - 0.25, 6)), atol=1e-6
        )
        assert metrics["aux_loss"] == 0
    assert np.abs(loads[-1] - 0.25).max() < 0.5 * np.abs(loads[0] - 0.25).max()


def test_a_collapsed_router_is_told_once_with_its_figures():
    writer = RouterWatch(MultiWriter([]), patience=2)
    even, one = [0.125] * 8, [0.93] + [0.01] * 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step, load in enumerate([one, even, even, one]):
            writer.write(step, {"load": load, "loss": 1.0})
    with pytest.warns(
        UserWarning, match=r"step 4, load: .* equivalent to 1\.5 of 8 experts .* expert 0 gets 93%"
    ):
        writer.write(4, {"load": jnp.asarray(one)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        writer.write(5, {"load": one})


def test_logits_that_are_no_numbers_skip_the_step():
    """A router that overflows must not spoil the model: the update is left out, as with any gradient that is not finite."""
    model = make(MoEConfig(num_experts=2, expert=MLPConfig(d_ff=8)))
    kernel = model.groups[0].blocks[1].feed_forward.router.logits.kernel
    kernel.set_value(jnp.full(kernel.shape, jnp.nan))
    optimizer = optax.sgd(0.1)
    state = create_train_state(model, optimizer, key=jax.random.key(0))
    new, metrics = jax.jit(make_train_step(next_token_loss, optimizer))(state, BATCH)
    assert int(metrics["skipped_in_row"]) == 1
    for a, b in zip(jax.tree.leaves(new.model), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(a, b)
