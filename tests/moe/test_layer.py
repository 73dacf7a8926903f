"""The layer: every way of dispatch against NumPy, its gradients against each other, and what it reports."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effscale.models import MLPConfig, Transformer, aux_loss, by_layer, gpt2
from effscale.models.context import build_context
from effscale.moe import MoEConfig, RouterConfig, with_experts

D, E = 12, 5
DISPATCH = ("table", "one_hot", "dropless")


def make(seed=0, **changes):
    given = {"num_experts": E, "expert": MLPConfig(d_ff=16, activation="silu", gated=True)}
    config = MoEConfig(**(given | changes))
    build = lambda: config.build(D, std=0.5, out_std=0.5, rngs=nnx.Rngs(seed))
    layer = jax.jit(build)()
    return jax.tree.map(lambda a: a + 0.1 if a.ndim == 2 and a.shape[0] == E else a, layer)


def context(batch=2, seq=8, **given):
    return build_context(seq, kind=None, head_dim=4, causal=True, **given)


X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, D)), jnp.float32)
REAL = jnp.asarray(np.arange(8)[None] >= np.array([[0], [3]]))


def expert(layer, number, x):
    one = jax.tree.map(lambda a: np.asarray(a)[number], layer.experts)
    at = lambda dense: x @ dense.kernel.get_value() + dense.bias.get_value()
    gate = at(one.gate)
    return (gate / (1 + np.exp(-gate)) * at(one.up)) @ one.down.kernel.get_value() + (
        one.down.bias.get_value()
    )


def slow(layer, x, k, capacity=None, real=None):
    """First choices first, then by token; weights of the kept ones add up to 1 (k = 1: as they are)."""
    rows = np.asarray(x).reshape(-1, D)
    real = np.ones(len(rows), bool) if real is None else np.asarray(real).reshape(-1)
    logits = rows @ np.asarray(layer.router.logits.kernel.get_value())
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    choices = np.argsort(-probs, axis=1, kind="stable")[:, :k]
    room = dict.fromkeys(range(E), len(rows) if capacity is None else capacity)
    kept = np.zeros((len(rows), k), bool)
    for choice in range(k):
        for token in np.where(real)[0]:
            at = choices[token, choice]
            kept[token, choice] = room[at] > 0
            room[at] -= 1
    y = np.zeros_like(rows)
    for token in range(len(rows)):
        weights = probs[token, choices[token]] * kept[token]
        if k > 1 and weights.sum():
            weights = weights / weights.sum()
        for at, weight in zip(choices[token], weights, strict=True):
            if weight:
                y[token] += weight * expert(layer, at, rows[token])
    return y.reshape(x.shape), kept


@pytest.mark.parametrize("dispatch", DISPATCH)
@pytest.mark.parametrize(("k", "factor", "capacity"), [(1, 1.0, 4), (2, 0.75, 5), (2, None, None)])
def test_against_numpy(dispatch, k, factor, capacity):
    router = RouterConfig(k=k, eval_capacity_factor=factor, min_capacity=0)
    layer = make(router=router, dispatch=dispatch)
    y, report = jax.jit(lambda m, x: m(x, context()))(layer, X)
    expected, kept = slow(layer, X, k, capacity)
    np.testing.assert_allclose(y, expected, atol=2e-5)
    np.testing.assert_allclose(report["dropped"], 1 - kept.mean(), atol=1e-6)
    np.testing.assert_allclose(report["load"].sum(), 1, rtol=1e-6)


@pytest.mark.parametrize("dispatch", DISPATCH)
def test_padding_goes_nowhere(dispatch):
    layer = make(router=RouterConfig(k=2, eval_capacity_factor=1.0), dispatch=dispatch)
    run = jax.jit(lambda m, x: m(x, context(valid=REAL)))
    y, report = run(layer, X)
    expected, _ = slow(layer, X, 2, 7, REAL)
    np.testing.assert_allclose(y[REAL], expected[REAL], atol=2e-5)
    np.testing.assert_array_equal(y[~REAL], 0)
    other = run(layer, jnp.where(REAL[..., None], X, 7.0))[1]
    for name, value in report.items():
        np.testing.assert_allclose(value, other[name], rtol=1e-5)


def test_gradients_are_the_same_however_tokens_travel():
    def loss(layer, x):
        y, report = layer(x, context(valid=REAL))
        return (y * jnp.sin(jnp.arange(y.size, dtype=y.dtype).reshape(y.shape))).sum() + report[
            "aux_loss"
        ]

    router = RouterConfig(k=2, eval_capacity_factor=0.75, z_loss=0.1)
    grads = {}
    for dispatch in DISPATCH:
        layer = make(router=router, dispatch=dispatch)
        grads[dispatch] = jax.jit(jax.grad(loss, argnums=(0, 1)))(layer, X)
    for dispatch in ("table", "dropless"):
        for a, b in zip(
            jax.tree.leaves(grads["one_hot"]), jax.tree.leaves(grads[dispatch]), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=1e-4)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads["one_hot"]))


@pytest.mark.parametrize("mix", ["weighted", "sum", "gated"])
def test_the_shared_part(mix):
    shared = MLPConfig(d_ff=8, activation="relu", bias=False)
    layer = make(shared=shared, mix=mix, router=RouterConfig(eval_capacity_factor=None))
    y, _ = jax.jit(lambda m, x: m(x, context()))(layer, X)
    routed, _ = slow(layer, X, 1)
    x = np.asarray(X)
    dense = (
        np.maximum(x @ layer.shared.up.kernel.get_value(), 0) @ layer.shared.down.kernel.get_value()
    )
    if mix == "sum":
        expected = routed + dense
    else:
        logits = x @ np.asarray(layer.coefficient.kernel.get_value())
        if mix == "gated":
            expected = routed + dense / (1 + np.exp(-logits))
        else:
            pair = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            expected = routed * pair[..., :1] + dense * pair[..., 1:]
    np.testing.assert_allclose(y, expected, atol=2e-5)


def test_groups_have_capacities_of_their_own():
    router = RouterConfig(eval_capacity_factor=1.0, min_capacity=0)
    layer = make(router=router, groups=2)
    y, _ = jax.jit(lambda m, x: m(x, context()))(layer, X)
    for row in range(2):
        expected, _ = slow(layer, X[row : row + 1], 1, 2)
        np.testing.assert_allclose(y[row : row + 1], expected, atol=2e-5)


def test_groups_count_by_their_tokens():
    """One row is padding alone: figures and loss are those of the other row."""
    router = RouterConfig(k=2, eval_capacity_factor=1.0)
    real = jnp.asarray(np.array([[True] * 8, [False] * 8]))
    run = lambda layer, x, valid: jax.jit(lambda m, x: m(x, context(len(x), valid=valid))[1])(
        layer, x
    )
    both = run(make(router=router, groups=2), X, real)
    one = run(make(router=router), X[:1], real[:1])
    for name, value in one.items():
        np.testing.assert_allclose(both[name], value, rtol=1e-6)


def test_what_was_asked_for_is_told_by_expert_without_a_capacity_too():
    layer = make(router=RouterConfig(k=2, eval_capacity_factor=None))
    given = dataclasses.replace(context(), capture=(("feed_forward_inner", None),))
    y, report = jax.jit(lambda m, x: m(x, given))(layer, X)
    assert report["feed_forward_inner"].shape == (E, 1, 16, 16)
    np.testing.assert_allclose(y, jax.jit(lambda m, x: m(x, context())[0])(layer, X), atol=1e-5)


@pytest.mark.parametrize("noise", ["jitter", "gumbel", "gumbel_second"])
def test_noise_in_training_only(noise):
    router = RouterConfig(k=2, noise=noise, capacity_factor=None, eval_capacity_factor=None)
    layer, quiet = make(router=router), make(router=dataclasses.replace(router, noise=None))
    run = jax.jit(lambda m, x, key: m(x, context(), key)[0])
    np.testing.assert_array_equal(run(layer, X, None), run(quiet, X, None))
    one, two = (run(layer, X, jax.random.key(seed)) for seed in (0, 1))
    assert np.abs(one - two).max() > 0
    np.testing.assert_array_equal(one, run(layer, X, jax.random.key(0)))


def test_the_second_choice_alone_is_drawn():
    router = RouterConfig(k=2, noise="gumbel_second", capacity_factor=None)
    layer = make(router=router)
    route = jax.jit(lambda m, key: m.router(X[0], None, key)[0].experts)
    chosen = np.stack([route(layer, jax.random.key(seed)) for seed in range(20)])
    assert (chosen[:, :, 0] == chosen[0, :, 0]).all()
    assert len({tuple(draw) for draw in chosen[:, :, 1]}) > 1


def test_the_router_computes_in_float32():
    layer = make(router=RouterConfig(k=2))
    run = jax.jit(lambda m, x: m(x, context()))
    y, report = run(layer, X.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert report["aux_loss"].dtype == jnp.float32
    exact = run(layer, X.astype(jnp.bfloat16).astype(jnp.float32))[1]
    np.testing.assert_array_equal(report["router_entropy"], exact["router_entropy"])


def test_in_a_model_it_is_a_pair_of_layers_that_is_scanned():
    dense = gpt2(num_layers=6, d_model=16, num_heads=2, vocab_size=23, max_length=16)
    moe = MoEConfig(num_experts=4, expert=MLPConfig(d_ff=16), shared=MLPConfig(d_ff=16))
    config = with_experts(dense, moe, [4, 4, 8])
    assert [(len(g.blocks), g.repeat) for g in config.groups] == [(2, 2), (1, 1), (1, 1)]
    model = jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()
    kernel = model.groups[0].blocks[1].feed_forward.experts.up.kernel
    assert kernel.shape == (2, 4, 16, 16)
    assert kernel.get_metadata()["axes"][0] == "experts"
    # Experts begin apart from each other.
    assert np.ptp(np.asarray(kernel.get_value())[0, :, 0, 0]) > 0
    ids = jnp.zeros((2, 8), jnp.int32)
    encoded = jax.jit(lambda m: m.encode(ids, key=jax.random.key(0)))(model)
    assert by_layer(encoded.reports, "dropped").shape == (3,)
    assert aux_loss(encoded.reports) > 0.03 * 0.9
    with pytest.warns(UserWarning, match="aux_loss"):
        jax.eval_shape(lambda m: m(ids, key=jax.random.key(0)), model)


def test_bad_input():
    mlp = MLPConfig(d_ff=4)
    with pytest.raises(ValueError, match=r"RouterConfig\.k must be at most num_experts=2 .*got 3"):
        MoEConfig(num_experts=2, expert=mlp, router=RouterConfig(k=3))
    with pytest.raises(ValueError, match=r"capacity_factor must be above 0, or None, got -1\.0"):
        RouterConfig(capacity_factor=-1.0)
    with pytest.raises(ValueError, match="gumbel_second"):
        RouterConfig(noise="gumbel_second")
    with pytest.raises(ValueError, match="groups must divide the 2 rows of a batch, got 3"):
        make(groups=3)(X, context(), jax.random.key(0))
    dense = gpt2(num_layers=4, d_model=16, num_heads=2, vocab_size=23, max_length=16)
    with pytest.raises(
        ValueError, match=r"one entry for each of the 2 layers with experts .*got 3"
    ):
        with_experts(dense, MoEConfig(num_experts=2, expert=mlp), [2, 2, 2])
