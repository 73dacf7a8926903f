"""Experts on eight devices: the same values and gradients in any layout, and no more communication than the formula says."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effscale.models import MLPConfig, Transformer, gpt2
from effscale.moe import MoEConfig, RouterConfig, with_experts
from effscale.parallel import (
    Exchange,
    MeshConfig,
    collectives,
    ragged_all_to_all,
    shard,
    shard_batch,
)
from effscale.parallel.expert_exchange import to_experts, to_tokens
from effscale.training import next_token_loss

D, E = 16, 8
IDS = np.random.default_rng(0).integers(0, 23, (8, 17))
BATCH = {"input_ids": IDS[:, :-1], "labels": IDS[:, 1:], "attention_mask": IDS[:, :-1] != 3}


def make(**changes):
    dense = gpt2(num_layers=2, d_model=D, num_heads=2, vocab_size=23, max_length=16)
    router = RouterConfig(k=2, capacity_factor=1.0, eval_capacity_factor=1.0, balance=0.1)
    given = {"num_experts": E, "expert": MLPConfig(d_ff=32), "router": router, "groups": 8}
    moe = MoEConfig(**(given | changes))
    config = dataclasses.replace(with_experts(dense, moe, every=1), init_std=0.3)
    return jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()


def loss(model, batch):
    return next_token_loss(model, batch, None).mean()


def gradients(mesh_config, model, devices=8):
    mesh = mesh_config.build(jax.devices()[:devices]) if mesh_config else None
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        batch = jax.tree.map(jnp.asarray, BATCH)
        if mesh:
            model, batch = shard(model, mesh), shard_batch(BATCH, mesh)
        compiled = jax.jit(jax.value_and_grad(loss)).lower(model, batch).compile()
        value, grads = compiled(model, batch)
        return float(value), jax.tree.map(np.asarray, grads), collectives(compiled.as_text())


@pytest.fixture(scope="module")
def expected():
    return gradients(None, make())


def assert_same(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(
    ("mesh", "exchange"),
    [
        (MeshConfig(data=8), Exchange()),
        (MeshConfig(data=4, expert=2), Exchange()),
        (MeshConfig(data=2, expert=4), Exchange(host_devices=2)),
        (MeshConfig(data=1, expert=8), Exchange(host_devices=4)),
        (MeshConfig(data=1, fsdp=2, expert=2, tensor=2), Exchange()),
        (MeshConfig(data=1, expert=4, tensor=2), Exchange(coordinated=False)),
    ],
    ids=str,
)
def test_gradients_do_not_depend_on_the_layout(mesh, exchange, expected):
    assert_same(gradients(mesh, make(exchange=exchange)), expected)


@pytest.fixture(scope="module")
def dropless():
    router = RouterConfig(k=2, capacity_factor=None, eval_capacity_factor=None, balance=0.1)
    model = make(router=router, dispatch="dropless")
    return model, gradients(None, model)


@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=2, expert=4)], ids=str
)
def test_without_a_capacity(mesh, dropless):
    """Tokens that travel to experts on other devices do so in pieces of the lengths that they have."""
    model, expected = dropless
    assert_same(gradients(mesh, model), expected)


def test_pieces_of_any_length_reach_their_places():
    """Against NumPy: device i sends to device j as many rows as a table says, and the gradient goes the way back."""
    sent = np.random.default_rng(0).integers(0, 4, (8, 8))
    sent[3] = 0
    starts = np.cumsum(sent, 1) - sent
    places = np.cumsum(sent, 0) - sent
    rows, out = 32, 40
    operand = np.random.default_rng(1).normal(size=(8, rows, 3)).astype(np.float32)
    expected = np.full((8, out, 3), -1, np.float32)
    for i in range(8):
        for j in range(8):
            piece = operand[i, starts[i, j] : starts[i, j] + sent[i, j]]
            expected[j, places[i, j] : places[i, j] + sent[i, j]] = piece

    def each(operand, starts, sent, places, received):
        own = (a[0] for a in (starts, sent, places, received))
        into = jnp.full((out, 3), -1, jnp.float32)
        return ragged_all_to_all(operand[0], into, *own, axis_name="expert")[None]

    mesh = MeshConfig(data=1, expert=8).build()
    spec = jax.sharding.PartitionSpec("expert")
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(each, in_specs=spec, out_specs=spec, check_vma=False)
        given = [jnp.asarray(a) for a in (operand, starts, sent, places, sent.T)]
        found, back = jax.jit(lambda *a: jax.vjp(lambda x: mapped(x, *a[1:]), a[0]))(*given)
        (gradient,) = jax.jit(back)(jnp.asarray(expected))
    np.testing.assert_array_equal(found, expected)
    # The rows that were sent come back as they went.
    for i in range(8):
        np.testing.assert_array_equal(gradient[i, : sent[i].sum()], operand[i, : sent[i].sum()])
        np.testing.assert_array_equal(gradient[i, sent[i].sum() :], 0)


@pytest.mark.parametrize(("tensor", "coordinated"), [(1, True), (2, True), (2, False)])
def test_bytes_are_those_of_the_formula(tensor, coordinated):
    """(p - 1) / p of E C M numbers, of which a device along ``tensor`` sends its share alone."""
    ranks, capacity = 4, 4
    mesh = MeshConfig(data=8 // ranks // tensor, expert=ranks, tensor=tensor).build()
    exchange = Exchange(coordinated=coordinated)

    def both(x):
        return to_tokens(jnp.sin(to_experts(x, exchange)), exchange)

    with jax.set_mesh(mesh):
        groups = 8 // tensor
        x = jnp.ones((E, groups, capacity, D))
        spec = jax.sharding.PartitionSpec(None, ("data", "expert"))
        x = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
        found = collectives(jax.jit(both).lower(x).compile().as_text())
    exchanges = [c for c in found if c.kind == "all-to-all"]
    share = tensor if coordinated else 1
    formula = (ranks - 1) / ranks * E * capacity * D * 4 / share
    assert [c.sent for c in exchanges] == [formula, formula]
    others = {c.kind for c in found} - {"all-to-all"}
    assert others == ({"all-gather"} if share > 1 else set())


def test_a_scanned_layer_and_its_gradient_send_four_times():
    """Two exchanges forward, two backward; none is hidden in a gather or a permutation of tokens."""
    found = gradients(MeshConfig(data=2, expert=4), make())[2]
    exchanges = [c for c in found if c.kind == "all-to-all"]
    assert [c.times for c in exchanges] == [2] * 4  # one program for both layers
    assert not [c for c in found if c.kind == "collective-permute"]


def test_experts_that_cannot_be_divided():
    with pytest.raises(
        ValueError,
        match="num_experts=6 cannot be divided over the 4 devices of the mesh axis expert",
    ):
        gradients(MeshConfig(data=2, expert=4), make(num_experts=6))
    with pytest.raises(ValueError, match="divide the width of each expert over the axis 'tensor'"):
        gradients(MeshConfig(data=1, expert=8), make(num_experts=4))
