"""Layers and stacked groups: arrangement, scan, remat, and the places where techniques plug in."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effscale.models import (
    AttentionConfig,
    BlockConfig,
    Dense,
    Group,
    LMHead,
    MLPConfig,
    Rotary,
    TokenInputs,
    Transformer,
    TransformerConfig,
    build_context,
    gpt2,
    run_group,
)
from effscale.models.block import Block

MLP = MLPConfig(d_ff=20)


def config_of(*groups, **changes):
    changes = {"positions": Rotary()} | changes
    return TransformerConfig(
        d_model=12, groups=groups, inputs=TokenInputs(vocab_size=19), heads=(LMHead(),), **changes
    )


def block_config(**changes):
    return BlockConfig(**{"attention": AttentionConfig(num_heads=2), "feed_forward": MLP} | changes)


@pytest.mark.parametrize("residual", ["pre", "pre_normed", "post", "parallel", "parallel_shared"])
def test_arrangements(residual, getkey):
    config = block_config(residual=residual)
    block = Block(config, config_of(Group(blocks=(config,), repeat=1)), rngs=nnx.Rngs(0))
    for norm in (block.attention_norm, block.feed_forward_norm):
        if norm is not None:
            norm.scale[...] = jax.random.normal(getkey(), (12,))
            norm.bias[...] = jax.random.normal(getkey(), (12,))
    context = build_context(5, kind=Rotary(), head_dim=6, causal=True)
    x = jax.random.normal(getkey(), (2, 5, 12))

    @jax.jit
    def by_hand(block, x):
        attend = lambda y: block.attention(y, context)[0]
        feed = lambda y: block.feed_forward(y, context)[0]
        one, two = block.attention_norm, block.feed_forward_norm
        if residual == "pre":
            x = x + attend(one(x))
            return x + feed(two(x))
        if residual == "pre_normed":
            x = one(x) + attend(one(x))
            return two(x) + feed(two(x))
        if residual == "post":
            x = one(x + attend(x))
            return two(x + feed(x))
        if residual == "parallel":
            return x + attend(one(x)) + feed(two(x))
        return x + attend(one(x)) + feed(one(x))

    found = jax.jit(lambda block, x: block(x, context)[0])(block, x)
    np.testing.assert_allclose(found, by_hand(block, x), atol=1e-5)
    assert (block.feed_forward_norm is None) == (residual == "parallel_shared")


def test_a_stack_is_its_layers_in_order(tiny, tokens):
    """Pairs of unlike blocks, several groups, and a group of one layer."""
    small, wide = (
        block_config(),
        block_config(feed_forward=MLPConfig(d_ff=28, activation="relu", gated=True)),
    )
    model = tiny(
        config_of(
            Group(blocks=(small, wide), repeat=3),
            Group(blocks=(wide,), repeat=1),
            Group(blocks=(small,), repeat=2),
        )
    )
    ids = tokens(model.config, 2, 5)

    @jax.jit
    def by_hand(model):
        context = build_context(5, kind=Rotary(), head_dim=6, causal=True)
        x = model.embed(ids, context.positions)
        for group in model.groups:
            for index in range(group.repeat):
                for stacked in group.blocks:
                    x = jax.tree.map(lambda a, i=index: a[i], stacked)(x, context)[0]
        return model.final_norm(x)

    assert model.config.num_layers == 9
    np.testing.assert_allclose(
        jax.jit(lambda m: m.encode(ids).hidden)(model), by_hand(model), atol=1e-5
    )


def test_layers_of_a_stack_start_different():
    model = Transformer(
        gpt2(num_layers=3, d_model=12, num_heads=2, vocab_size=19), rngs=nnx.Rngs(0)
    )
    kernels = model.groups[0].blocks[0].attention.query.kernel[...]
    assert kernels.shape == (3, 12, 12)
    assert len(np.unique(kernels)) == kernels.size


def test_initial_scale_of_residual_projections():
    for scaled, factor in ((True, (2 * 3) ** -0.5), (False, 1.0)):
        config = dataclasses.replace(
            gpt2(num_layers=3, d_model=64, num_heads=2, vocab_size=19), scale_residual_init=scaled
        )
        block = (
            jax.jit(lambda config=config: Transformer(config, rngs=nnx.Rngs(0)))()
            .groups[0]
            .blocks[0]
        )
        for out, into in (
            (block.attention.out, block.attention.query),
            (block.feed_forward.down, block.feed_forward.up),
        ):
            assert float(out.kernel[...].std() / into.kernel[...].std()) == pytest.approx(
                factor, rel=0.05
            )


def equations(jaxpr):
    """Equations of a jaxpr and of all those inside it."""
    total = 0
    for equation in jaxpr.eqns:
        total += 1
        for parameter in jax.tree.leaves(
            equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            total += equations(inner) if hasattr(inner, "eqns") else 0
    return total


def test_the_program_does_not_grow_with_depth():
    def program(layers):
        model = nnx.eval_shape(
            lambda: Transformer(
                gpt2(num_layers=layers, d_model=12, num_heads=2, vocab_size=19), rngs=nnx.Rngs(0)
            )
        )
        loss = lambda model: model(jnp.zeros((1, 8), jnp.int32)).sum()
        return equations(jax.make_jaxpr(jax.grad(loss))(model).jaxpr)

    assert program(4) == program(12) > 100


@pytest.mark.parametrize(
    ("repeat", "policies"),
    [
        (1, ("full",)),
        (3, ("full", "dots", "dots_no_batch", ("attention_mixed", "feed_forward_inner"))),
    ],
)
def test_remat_changes_no_gradient_and_computes_more(repeat, policies, tiny, tokens):
    group = Group(blocks=(block_config(),), repeat=repeat)

    def gradient(remat):
        model = tiny(config_of(group, remat=remat))
        ids = tokens(model.config, 2, 5)
        loss = lambda model: jax.nn.logsumexp(model(ids), -1).sum()
        compiled = jax.jit(jax.grad(loss)).lower(model).compile()
        return compiled(model), compiled.as_text().count(" exponential(")

    plain, exponentials = gradient("none")
    for remat in policies:
        found, recomputed = gradient(remat)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)
        assert recomputed > exponentials, remat  # the softmax is there a second time


def products(model, ids):
    loss = lambda model: jax.nn.logsumexp(model(ids), -1).sum()
    return jax.jit(jax.grad(loss)).lower(model).as_text().count("stablehlo.dot_general")


@pytest.mark.parametrize(
    ("kept", "saved"),
    [
        (("query", "key", "value"), 3),
        (("attention_out",), 1),
        (("feed_forward_up", "feed_forward_gate"), 2),
        (("layer_in",), 0),  # a layer's input is kept anyway
    ],
)
def test_points_that_are_kept_are_not_computed_again(kept, saved, tiny, tokens):
    gated = block_config(feed_forward=MLPConfig(d_ff=20, gated=True))
    model = lambda remat: tiny(config_of(Group(blocks=(gated,), repeat=2), remat=remat))
    ids = tokens(model("full").config, 2, 5)
    assert products(model("full"), ids) - products(model(kept), ids) == saved


@pytest.mark.parametrize("name", ["gpt2", "bloom-odd", "llama"])
def test_bfloat16(name, tiny, tokens):
    check_compute_type(name, "bfloat16", tiny, tokens)


def test_float16(tiny, tokens):
    check_compute_type("gpt2", "float16", tiny, tokens)


def check_compute_type(decoder, dtype, tiny, tokens):
    model, low = tiny(decoder), tiny(decoder, dtype=dtype)
    ids = tokens(model.config, 2, 6)
    run = jax.jit(lambda model: model(ids))
    exact, rough = run(model), run(low)
    assert rough.dtype == jnp.dtype(dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(low)} == {jnp.dtype("float32")}
    difference = jnp.abs(rough.astype(jnp.float32) - exact)
    assert 0 < float(difference.mean()) < 0.05 * float(jnp.abs(exact).mean() + exact.std())
    grads = jax.jit(jax.grad(lambda model: model(ids).astype(jnp.float32).sum()))(low)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


class Doubler(nnx.Module):
    """A feed-forward that reports, as experts do."""

    def __init__(self, d_model, rngs):
        self.inner = Dense(d_model, d_model, rngs=rngs)

    def __call__(self, x, context, key=None):
        return 2 * self.inner(x), {
            "load": jnp.abs(x).sum(),
            "dropped": jnp.zeros(3) if key is None else jnp.ones(3),
        }


def test_parameters_of_half_precision(family, tiny, tokens):
    """As they come out of a file: products in the config's type, with the values that the file has."""
    model = jax.tree.map(lambda a: a.astype(jnp.bfloat16), tiny(family))
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), model)
    config = model.config
    x = jnp.ones((2, 8, 8, 3)) if family == "vit" else tokens(config, 2, 5)
    run = jax.jit(lambda model: model(x))
    for found, expected in zip(
        jax.tree.leaves(run(model)), jax.tree.leaves(run(wide)), strict=True
    ):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=1e-5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoublerConfig:
    def build(self, d_model, *, std, out_std, rngs):
        return Doubler(d_model, rngs)


def test_a_feed_forward_of_ones_own_and_its_reports(tiny, tokens):
    pair = (block_config(feed_forward=DoublerConfig()), block_config())
    model = tiny(config_of(Group(blocks=pair, repeat=2), Group(blocks=pair[:1], repeat=1)))
    ids = tokens(model.config, 2, 5)
    encoded = jax.jit(lambda m: m.encode(ids))(model)
    shapes = jax.tree.map(jnp.shape, encoded.reports, is_leaf=lambda x: isinstance(x, jax.Array))
    report = lambda n: {"load": (n,), "dropped": (n, 3)}
    assert shapes == ((report(2), {}), (report(1),))
    with_key = jax.jit(lambda m: m.encode(ids, key=jax.random.key(0)))(model)
    assert with_key.reports[0][0]["dropped"].all()


def test_run_group_is_where_token_dropping_steps_in(tiny, tokens):
    """Middle layers on the first five tokens only give those the same values, and leave the rest as they came."""
    model = tiny(config_of(*[Group(blocks=(block_config(),), repeat=2)] * 2))
    ids = tokens(model.config, 2, 8)
    seen = []

    def drop_later(index, group, x, context, cache, key):
        seen.append((index, context.positions.shape))
        if index == 0:
            return run_group(index, group, x, context, cache, key)
        short = build_context(
            5, kind=Rotary(), head_dim=6, causal=True, positions=context.positions[:, :5]
        )
        y, cache, reports = run_group(index, group, x[:, :5], short, cache, key)
        return jnp.concatenate([y, x[:, 5:]], 1), cache, reports

    plain = jax.jit(lambda m: m.encode(ids).hidden)(model)
    found = jax.jit(lambda m: m.encode(ids, run_group=drop_later).hidden)(model)
    np.testing.assert_allclose(found[:, :5], plain[:, :5], atol=1e-5)
    assert float(jnp.abs(found - plain)[:, 5:].max()) > 1e-3
    assert [index for index, _ in seen] == [0, 1]
    called = jax.jit(lambda m: m(ids, run_group=drop_later))(model)
    np.testing.assert_allclose(called, model.outputs(found), atol=1e-5)
