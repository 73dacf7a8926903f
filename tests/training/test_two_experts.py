"""A feed-forward of two experts with an auxiliary loss, as a user writes it, through all that runs layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effscale.generation import SamplingConfig, generate
from effscale.ltd import RandomLTD, mslg, sample_kept, token_dropping
from effscale.models import (
    Dense,
    Group,
    MLPConfig,
    Transformer,
    aux_loss,
    by_layer,
    empty_cache,
    gpt2,
)
from effscale.training import (
    Loss,
    add_reports,
    create_train_state,
    make_train_step,
    next_token_loss,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoExpertsConfig:
    d_ff: int
    coefficient: float = 0.1
    points = ("router_probs",)

    def build(self, d_model, *, std, out_std, rngs):
        return TwoExperts(self, d_model, std=std, out_std=out_std, rngs=rngs)


class TwoExperts(nnx.Module):
    def __init__(self, config, d_model, *, std, out_std, rngs):
        self.router = Dense(d_model, 2, bias=False, std=std, axes=("embed", None), rngs=rngs)
        expert = MLPConfig(d_ff=config.d_ff)
        build = lambda r: expert.build(d_model, std=std, out_std=out_std, rngs=r)
        self.experts = jax.vmap(build)(rngs.split(2))
        self.coefficient = config.coefficient

    def __call__(self, x, context, key=None):
        real = jnp.ones(x.shape[:2], bool) if context.real is None else context.real
        real = real.astype(jnp.float32)
        probs = jax.nn.softmax(self.router(x).astype(jnp.float32))
        probs = jax.ad_checkpoint.checkpoint_name(probs, "router_probs")
        chosen = jax.nn.one_hot(probs.argmax(-1), 2) * real[..., None]
        mean = lambda a: a.sum((0, 1)) / jnp.maximum(real.sum(), 1)
        balance = 2 * (mean(chosen) * mean(probs * real[..., None])).sum()
        every = jax.vmap(lambda expert: expert(x, context)[0])(self.experts)
        y = jnp.einsum("ebsd,bse->bsd", every, (chosen * probs).astype(x.dtype))
        report = {"aux_loss": self.coefficient * balance, "load": chosen.sum((0, 1))}
        return y, report | context.captured(router_probs=probs)


def make(repeat=2, **changes):
    """A dense layer and one of experts, twice."""
    config = gpt2(num_layers=1, d_model=16, num_heads=2, vocab_size=23, max_length=16)
    dense = config.blocks[0]
    experts = TwoExpertsConfig(d_ff=12)
    pair = (dense, dataclasses.replace(dense, feed_forward=experts))
    config = dataclasses.replace(
        config, groups=(Group(blocks=pair, repeat=repeat),), init_std=0.3, **changes
    )
    return jax.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def model():
    return make()


LEFT = np.arange(8)[None] >= np.array([[0], [3]])
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 23, (2, 8)), jnp.int32)
BATCH = {"input_ids": IDS[:, :-1], "labels": IDS[:, 1:]}


@pytest.mark.parametrize("kind", ["mask", "packed", "cache"])
def test_padding_is_not_routed(kind, model):
    """Neither the loads nor the auxiliary loss see it, whatever tokens stand there."""
    given = {"attention_mask": jnp.asarray(LEFT)}
    if kind == "packed":
        given = {"segment_ids": jnp.asarray(LEFT, jnp.int32)}
    if kind == "cache":
        given["cache"] = empty_cache(model.config, 2, 10)
    run = jax.jit(lambda m, ids: m.encode(ids, **given).reports)
    reports, other = run(model, IDS), run(model, jnp.where(LEFT, IDS, 5))
    np.testing.assert_array_equal(by_layer(reports, "load").sum(-1), [LEFT.sum()] * 2)
    np.testing.assert_allclose(aux_loss(reports), aux_loss(other), rtol=1e-6)


def test_a_finished_row_is_not_routed_while_decoding(model):
    cache = dataclasses.replace(empty_cache(model.config, 2, 10), length=jnp.int32(8))
    mask = jnp.array([[True], [False]])
    step = jax.jit(lambda m, c: m.encode(IDS[:, :1], attention_mask=mask, cache=c).reports)
    one = step(model, cache)
    np.testing.assert_array_equal(by_layer(one, "load").sum(-1), [1, 1])


def test_layers_that_drop_tokens_route_what_they_keep(model):
    key = jax.random.key(3)
    runner = token_dropping(model.config, kept=4, key=key, layers=(1, 2))
    mask = jnp.asarray(LEFT)
    run = jax.jit(lambda m: m.encode(IDS, attention_mask=mask, run_group=runner).reports)
    reports = run(model)
    at = np.asarray(sample_kept(key, (1,), 2, 8, 4)[0])
    kept = np.take_along_axis(LEFT, at, 1).sum()
    np.testing.assert_array_equal(by_layer(reports, "load").sum(-1), [kept, LEFT.sum()])


def test_the_auxiliary_loss_reaches_every_gradient():
    """The mean loss grows by its sum over layers, and so do the gradients."""
    # Of an odd number of tokens: equal loads would leave no gradient.
    batch = {name: rows[:1] for name, rows in BATCH.items()}
    model, weight = make(repeat=1), batch["labels"].size

    def parts(model):
        extra = aux_loss(model.encode(batch["input_ids"]).reports)
        loss = next_token_loss(model, batch)
        return jnp.stack([loss.total, loss.metrics["task_loss"], weight * extra])

    (total, task, extra), gradients = jax.jit(lambda m: (parts(m), jax.jacrev(parts)(m)))(model)
    np.testing.assert_allclose(total, task + extra, rtol=1e-6)
    assert float(extra) > 0.1 * weight
    for of_total, of_task, of_extra in jax.tree.leaves(gradients):
        np.testing.assert_allclose(of_total, of_task + of_extra, atol=1e-3)
    router = gradients.groups[0].blocks[1].feed_forward.router.kernel.get_value()
    assert float(jnp.abs(router[2]).max()) > 1e-3


def test_trained_with_dropped_tokens_and_kept_points():
    """Random-LTD, a scan over pairs, remat by name and micro-batches at once; the parts add up to the loss."""
    model = make(remat=("attention_out", "router_probs"))
    ltd = RandomLTD(pacing=mslg(min_value=4, max_value=7, require_steps=9, seq_per_step=1))
    optimizer = optax.adam(1e-2)
    step = jax.jit(make_train_step(ltd.loss(next_token_loss), optimizer, accumulate=2))
    state = create_train_state(model, optimizer, key=jax.random.key(0))
    losses = []
    for _ in range(6):
        state, metrics = step(state, ltd.shape_batch(BATCH, 4))
        losses.append(float(metrics["loss"]))
        np.testing.assert_allclose(
            losses[-1], metrics["task_loss"] + metrics["aux_loss"], rtol=1e-5
        )
    assert losses[-1] < losses[0] - 0.3
    assert metrics["load"].shape == (2,)
    # A micro-batch is a row of 7 tokens: layer 1 keeps 4 of them, layer 3 sees all.
    np.testing.assert_allclose(metrics["load"].sum(), (4 + 7) / 2, rtol=1e-6)


def test_decoded_with_a_cache(model):
    mask = jnp.asarray(LEFT)
    out = generate(
        model, IDS, SamplingConfig(max_new_tokens=3, temperature=0.0), attention_mask=mask
    )
    run = jax.jit(lambda ids, mask: model(ids, attention_mask=mask)[:, -1].argmax(-1))
    ids = IDS
    for _ in range(3):
        ids = jnp.concatenate([ids, run(ids, mask)[:, None].astype(jnp.int32)], 1)
        mask = jnp.pad(mask, ((0, 0), (0, 1)), constant_values=True)
    np.testing.assert_array_equal(out.tokens, ids)


def test_a_plain_call_in_training_warns(model):
    with pytest.warns(UserWarning, match="drops the aux_loss"):
        model(IDS, key=jax.random.key(0))
    model(IDS)  # without a key nothing is trained, and nothing is said


def test_losses_of_other_names_are_refused():
    reports = (({"balance_loss": jnp.ones(2)},),)
    with pytest.raises(ValueError, match=r"reports 'balance_loss', but only 'aux_loss' is added"):
        add_reports(Loss(jnp.float32(1), jnp.float32(1)), reports)
    reports = (({"accuracy": jnp.ones(2)},),)
    with pytest.raises(ValueError, match=r"\['accuracy'\], which are already metrics of the loss"):
        add_reports(Loss(jnp.float32(1), jnp.float32(1), {"accuracy": jnp.float32(1)}), reports)


def test_loads_of_unlike_layers_stay_apart():
    """As in a pyramid of experts; and what is neither scalar nor vector is no metric."""
    small, wide = (
        {"load": jnp.array([[1.0, 3.0]]), "map": jnp.ones((1, 2, 2))},
        {"load": jnp.ones((2, 4))},
    )
    loss = add_reports(Loss(jnp.float32(6), jnp.float32(2)), ((small,), (), ({}, wide)))
    assert {name: value.tolist() for name, value in loss.means().items()} == {
        "load/0.0": [1, 3],
        "load/2.1": [1, 1, 1, 1],
    }
    assert float(loss.total) == 6
