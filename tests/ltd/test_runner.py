"""Models that drop tokens, beside loops over layers and rows."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from effscale.ltd import sample_kept, token_dropping
from effscale.models import (
    Group,
    MLPConfig,
    empty_cache,
    gpt2,
    unroll,
)
from effscale.models.mlp import MLP
from effscale.moe import MoEConfig, RouterConfig, with_experts
from effscale.parallel import MeshConfig, shard, shard_batch
from effscale.training import named_leaves

KEY = jax.random.key(11)
SEQ = 9
LEFT = jnp.asarray(np.arange(SEQ)[None] >= np.array([[0], [3]]), jnp.int32)
RIGHT = jnp.asarray(np.arange(SEQ)[None] < np.array([[SEQ], [6]]), jnp.int32)
SEGMENTS = jnp.asarray([[1] * 4 + [2] * 5, [1] * 2 + [2] * 4 + [0] * 3], jnp.int32)
CASES = {
    "gpt2 left": {"attention_mask": LEFT},
    "bloom right": {"attention_mask": RIGHT},
    "gptj left": {"attention_mask": LEFT},
    "llama packed": {"segment_ids": SEGMENTS},
    "bert right": {"attention_mask": RIGHT, "type_ids": SEGMENTS % 2},
    "vit": {},
}


def noise(*shape):
    return jnp.asarray(np.random.default_rng(5).normal(size=shape).astype(np.float32))


def dropped(model, inputs, *, kept, key=KEY, layers=None, dropout_key=None, **given):
    runner = token_dropping(model.config, kept=kept, key=key, layers=layers)
    return model.encode(inputs, run_group=runner, key=dropout_key, **given).hidden


def with_gradient(hidden, **static):
    """Hidden states, and the gradient of a random projection of them for all parameters."""

    @jax.jit
    def run(model, inputs):
        def loss(model):
            out = hidden(model, inputs, **static)
            return (out * noise(*out.shape)).sum(), out

        return jax.grad(loss, has_aux=True)(model)

    return run


def close(found, expected, atol=2e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=atol * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize("case", CASES)
def test_values(case, tiny, tokens, loops):
    model, given = tiny(case.split()[0]), CASES[case]
    inputs = noise(2, 12, 12, 3) if case == "vit" else tokens(2, SEQ)
    found = dropped(model, inputs, kept=4, **given)
    close(found, loops(model, inputs, kept=4, key=KEY, **given))
    plain = model.encode(inputs, **given).hidden
    assert (jnp.abs(found - plain).max(-1) > 1e-3).mean() > 0.5


@pytest.mark.parametrize("case", ["llama packed", "bert right"])
def test_gradients(case, tiny, tokens, loops):
    model, given = tiny(case.split()[0]), CASES[case]
    inputs = tokens(2, SEQ)
    found = with_gradient(dropped, kept=4, **given)(model, inputs)
    close(found, with_gradient(loops, kept=4, key=KEY, **given)(model, inputs))


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_recomputed_layers_keep_the_same_tokens(remat, tiny, tokens):
    ids = tokens(2, SEQ)
    expected = with_gradient(dropped, kept=4)(tiny("gpt2"), ids)
    close(with_gradient(dropped, kept=4)(tiny("gpt2", remat=remat), ids), expected)


def test_layers_are_numbers_and_not_digits_of_names(tiny, tokens, loops):
    """The original matches "1" to layers 10 and 11 as well."""
    model = tiny(gpt2(num_layers=12, d_model=16, num_heads=2, vocab_size=37, max_length=24))
    ids = tokens(2, SEQ)
    close(dropped(model, ids, kept=4, layers=(1,)), loops(model, ids, kept=4, key=KEY, layers=(1,)))


class CountingMLP(MLP):
    """Reports how many tokens it saw."""

    def __call__(self, x, context, key=None):
        y, _ = super().__call__(x, context, key)
        return y, {"tokens": jnp.int32(x.shape[1]), "sum": x.sum((0, 1))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counting(MLPConfig):
    def build(self, d_model, **parts):
        return CountingMLP(self, d_model, **parts)


def unlike_groups(tiny):
    """Two groups, one of pairs of blocks: layers 0 1, 2 3, 4 5 and 6, 7, 8."""
    config = gpt2(num_layers=1, d_model=16, num_heads=2, vocab_size=37, max_length=24)
    block = config.blocks[0]
    narrow = dataclasses.replace(block, feed_forward=Counting(d_ff=12))
    wide = dataclasses.replace(block, feed_forward=Counting(d_ff=20))
    groups = (Group(blocks=(narrow, wide), repeat=3), Group(blocks=(wide,), repeat=3))
    return tiny(dataclasses.replace(config, groups=groups))


def test_experts_have_room_for_what_is_kept(tiny, tokens, loops):
    """The capacity follows from the four tokens that a row keeps, and some of their choices are dropped."""
    router = RouterConfig(k=2, eval_capacity_factor=0.5, min_capacity=0)
    experts = MoEConfig(num_experts=4, expert=MLPConfig(d_ff=8), router=router, groups=2)
    config = gpt2(num_layers=4, d_model=16, num_heads=2, vocab_size=37, max_length=24)
    model, ids = tiny(with_experts(config, experts, every=1)), tokens(2, SEQ)
    runner = token_dropping(model.config, kept=4, key=KEY)
    encoded = model.encode(ids, run_group=runner)
    close(encoded.hidden, loops(model, ids, kept=4, key=KEY))
    assert jnp.min(encoded.reports[0][0]["dropped"]) > 0


@pytest.mark.parametrize("layers", [None, (1, 3, 5, 6), (0, 7)], ids=str)
def test_groups_and_reports(layers, tiny, tokens, loops):
    """The feed-forward sees only what is kept; its reports have the shape of the plain run's."""
    model, ids = unlike_groups(tiny), tokens(2, SEQ)
    runner = token_dropping(model.config, kept=4, key=KEY, layers=layers)
    encoded = model.encode(ids, run_group=runner)
    close(encoded.hidden, loops(model, ids, kept=4, key=KEY, layers=layers))
    plain = model.encode(ids)
    assert jax.tree.map(jnp.shape, encoded.reports) == jax.tree.map(jnp.shape, plain.reports)
    pair, single = encoded.reports
    seen = np.concatenate(
        [np.stack([b["tokens"] for b in pair], 1).reshape(-1), single[0]["tokens"]]
    )
    chosen = range(1, 8) if layers is None else layers
    assert seen.tolist() == [4 if number in chosen else SEQ for number in range(9)]


def test_like_layers_run_in_one_loop(tiny, tokens):
    model, ids = tiny("gpt2"), tokens(2, SEQ)
    text = str(jax.make_jaxpr(functools.partial(dropped, kept=4))(model, ids))
    assert re.findall(r"\blength=(\d+)", text) == ["2"]


@pytest.mark.parametrize("kept", [SEQ, SEQ + 1])
def test_as_many_tokens_as_there_are_is_the_plain_model(kept, tiny, tokens):
    model, ids = tiny("gpt2"), tokens(2, SEQ)
    runner = token_dropping(model.config, kept=kept, key=KEY)
    plain = jax.jit(lambda m, i: m.encode(i).hidden)
    same = jax.jit(lambda m, i: m.encode(i, run_group=runner).hidden)
    assert same.lower(model, ids).as_text() == plain.lower(model, ids).as_text()
    np.testing.assert_array_equal(same(model, ids), plain(model, ids))


def test_dropout_falls_as_it_always_does(tiny, tokens, loops):
    """On one row, where a loop over rows draws the same masks; the key is the one that chooses tokens, too."""
    config = gpt2(num_layers=4, d_model=16, num_heads=2, vocab_size=37, max_length=24, dropout=0.3)
    model, ids = tiny(config), tokens(1, SEQ)
    found = dropped(model, ids, kept=4, dropout_key=KEY)
    close(found, loops(model, ids, kept=4, key=KEY, dropout_key=KEY))
    assert (jnp.abs(found - dropped(model, ids, kept=4)).max(-1) > 1e-3).all()


def test_a_layer_that_keeps_all_computes_what_it_always_does(tiny, tokens):
    """With dropout, in a batch: only the last layer drops, so the ones before are as in the plain run."""
    config = gpt2(num_layers=4, d_model=16, num_heads=2, vocab_size=37, max_length=24, dropout=0.3)
    model, ids = tiny(dataclasses.replace(config, final_norm=None)), tokens(3, SEQ)
    found = dropped(model, ids, kept=4, layers=(3,), dropout_key=KEY)
    last = model.groups[0].blocks[0]  # made the identity, so that it shows what came before
    for dense in (last.attention.out, last.feed_forward.down):
        dense.kernel[...] = dense.kernel[...].at[3].set(0.0)
        dense.bias[...] = dense.bias[...].at[3].set(0.0)
    without_last = model.encode(ids, key=KEY).hidden
    kept = np.asarray(sample_kept(KEY, (3,), 3, SEQ, 4)[0])
    for row in range(3):
        passed = np.setdiff1d(np.arange(SEQ), kept[row])
        np.testing.assert_allclose(found[row, passed], without_last[row, passed], atol=1e-5)
        assert (jnp.abs(found[row, kept[row]] - without_last[row, kept[row]]).max(-1) > 1e-3).all()


def test_an_unrolled_model_keeps_the_same_tokens(tiny, tokens):
    model, ids = tiny("llama"), tokens(2, SEQ)
    close(dropped(unroll(model), ids, kept=4), dropped(model, ids, kept=4))


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_on_a_mesh_as_on_one_device(sizes, tiny, tokens):
    model, ids = tiny("llama"), tokens(8, 16)
    run = with_gradient(dropped, kept=8)
    expected = run(model, ids)
    mesh = MeshConfig(**sizes).build()
    with jax.set_mesh(mesh):
        inputs = shard(model, mesh), shard_batch(np.asarray(ids), mesh)
        close(run(*inputs), expected)
        text = run.lower(*inputs).compile().as_text()
    if set(sizes) == {"data"}:  # parameters are whole, so nothing but their gradient is exchanged
        assert "all-reduce" in text
        assert not re.search(r"all-gather|all-to-all|collective-permute", text)


def test_shards_on_their_own_drop_other_tokens(tiny, tokens):
    """Inside a shard_map that holds the batch axis, as gradient compression has it."""
    model, row = tiny("gpt2"), tokens(1, SEQ)
    mesh = MeshConfig(data=2).build(jax.devices()[:2])
    ids = jnp.concatenate([row, row])
    run = lambda model, ids: dropped(model, ids, kept=4)
    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), axis_names={"data"}
    )
    with jax.set_mesh(mesh):
        out = jax.jit(mapped)(model, ids)
    assert (jnp.abs(out[0] - out[1]).max(-1) > 1e-3).mean() > 0.5


def test_nothing_is_wrapped(tiny):
    """The original renames parameters and strips the names again when it saves."""
    model = tiny("gpt2")
    names = [leaf.name for leaf in named_leaves(model)]
    token_dropping(model.config, kept=4, key=KEY)
    assert [leaf.name for leaf in named_leaves(model)] == names
    assert not any("ltd" in name for name in names)


def few(num_layers):
    return gpt2(num_layers=num_layers, d_model=16, num_heads=2, vocab_size=37, max_length=24)


@pytest.mark.parametrize(
    ("num_layers", "change", "message"),
    [
        (2, {}, "leaves none of 2"),
        (4, {"layers": ()}, "at least one layer"),
        (4, {"layers": (1, 4, -1)}, r"from 0 to 3, .*\[4, -1\] are not in the model"),
        (4, {"layers": (1, 1)}, "duplicates, got"),
        (4, {"kept": 0}, "kept must be at least 1, got 0"),
    ],
)
def test_bad_input(num_layers, change, message):
    with pytest.raises(ValueError, match=message):
        token_dropping(few(num_layers), **({"kept": 4, "key": KEY} | change))


def test_a_cache_is_an_error(tiny, tokens):
    model = tiny("gpt2")
    cache = empty_cache(model.config, 2, 12)
    with pytest.raises(ValueError, match="cache"):
        model.encode(
            tokens(2, SEQ), cache=cache, run_group=token_dropping(model.config, kept=4, key=KEY)
        )
