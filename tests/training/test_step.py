import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effscale.training import (
    AdamWConfig,
    Clip,
    Loss,
    ScheduleConfig,
    by_tokens,
    create_train_state,
    evaluate,
    make_eval_step,
    make_train_step,
    named_leaves,
)
from effscale.training.state import ema_model
from effscale.training.step import count_tokens, split_batch

guarded_update = importlib.import_module("effscale.training.guarded_update")
step_module = importlib.import_module("effscale.training.step")


def state_of(toy, optimizer, **options):
    return create_train_state(
        toy.Toy(rngs=nnx.Rngs(0)), optimizer, key=jax.random.key(3), **options
    )


def without_key(toy):
    """The toy's loss without dropout, whose masks would depend on how a batch is cut."""
    return lambda model, batch, key: toy.loss_fn(model, batch, None)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def numpy_free_gradient(toy, model, batch):
    """Gradient of the mean of the whole batch, without any of the step's code."""

    def mean(model):
        loss = toy.loss_fn(model, batch, None)
        return loss.total / loss.weight

    return jax.value_and_grad(mean)(model)


@pytest.mark.parametrize("accumulate", [1, 2, 4, 8])
def test_accumulation_is_the_true_mean(toy, accumulate):
    batch = toy.batch_of(8)
    row_weights = batch["loss_weights"].sum(1)
    assert len(set(row_weights.tolist())) > 2  # micro-batches do hold unequal weights
    state = state_of(toy, optax.sgd(1.0))
    step = jax.jit(make_train_step(without_key(toy), optax.sgd(1.0), accumulate=accumulate))
    loss, gradient = numpy_free_gradient(toy, state.model, batch)
    new, metrics = step(state, batch)
    close(jax.tree.map(jnp.subtract, state.model, new.model), gradient)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["weight"], row_weights.sum())
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-5)
    sums = toy.loss_fn(state.model, batch, None)
    np.testing.assert_allclose(
        metrics["accuracy"], sums.metrics["accuracy"] / sums.weight, rtol=1e-6
    )


def test_scalars_of_a_batch_go_to_every_micro_batch(toy):
    """Arrays of no dimensions, keys and numbers alike; an array of one number has a row."""
    key = jax.random.key(7)

    def loss_fn(model, batch, _):
        total = (batch["x"] * model["w"]).sum() * batch["half"] * batch["number"]
        return Loss(total + 0.0 * jax.random.normal(batch["key"]), jnp.float32(batch["x"].size))

    batch = {"half": np.float32(0.5), "key": key, "number": 2.0, "x": jnp.arange(8.0)}
    state = create_train_state({"w": jnp.float32(1.0)}, optax.sgd(1.0), key=key)
    new, metrics = make_train_step(loss_fn, optax.sgd(1.0), accumulate=4)(state, batch)
    assert (metrics["loss"], new.model["w"]) == (3.5, 1.0 - 3.5)
    assert int(new.tokens) == count_tokens(batch) == 8
    assert split_batch(key, 4).shape == split_batch(2.0, 4).shape == (4,)
    with pytest.raises(ValueError, match="micro-batches, got 1"):
        split_batch(np.ones(1), 4)
    with pytest.raises(ValueError, match="no array with rows"):
        count_tokens({"number": 2.0})


def test_micro_batches_get_keys_of_their_own(toy):
    seen = []

    def loss_fn(model, batch, key):
        jax.debug.callback(lambda key: seen.append(key.tolist()), jax.random.key_data(key))
        return toy.loss_fn(model, batch, key)

    step = jax.jit(make_train_step(loss_fn, optax.sgd(0.1), accumulate=4))
    state, _ = step(state_of(toy, optax.sgd(0.1)), toy.batch_of(8))
    step(state, toy.batch_of(8))
    jax.effects_barrier()
    assert len({tuple(key) for key in seen}) == 8


def test_clipping(toy):
    batch, state = toy.batch_of(8), state_of(toy, optax.sgd(1.0))
    _, gradient = numpy_free_gradient(toy, state.model, batch)
    norm = float(optax.tree.norm(gradient))
    for clip in (norm / 3, norm * 3):
        new, metrics = jax.jit(make_train_step(without_key(toy), optax.sgd(1.0), clip=Clip(clip)))(
            state, batch
        )
        moved = jax.tree.map(jnp.subtract, state.model, new.model)
        np.testing.assert_allclose(optax.tree.norm(moved), min(norm, clip), rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)


@pytest.mark.parametrize(
    ("poison", "form"),
    [
        ("loss", "by_branch"),
        ("gradient", "by_branch"),
        ("weight", "by_branch"),
        ("update", "by_branch"),
        ("gradient", "by_selection"),
        ("update", "by_selection"),
    ],
)
def test_bad_updates_are_skipped_bit_for_bit(toy, poison, form, monkeypatch):
    sound = lambda new, old: ~guarded_update.loses_finite(new, old)
    update_if = lambda condition, update, old, axis_name: getattr(guarded_update, form)(
        condition, update, sound, old
    )
    monkeypatch.setattr(step_module, "update_if", update_if)

    def loss_fn(model, batch, key):
        loss = toy.loss_fn(model, batch, None)
        table = model.embedding.get_value()
        bad = batch["bad"].max()
        if poison == "loss":
            return dataclasses.replace(loss, total=loss.total + jnp.where(bad > 0, jnp.inf, 0.0))
        if poison == "gradient":  # sqrt has an infinite slope at zero, and 0 * inf is NaN
            return dataclasses.replace(
                loss, total=loss.total + jnp.sqrt(jnp.maximum(1 - bad, 0) + 0 * table.sum())
            )
        if poison == "weight":
            return dataclasses.replace(loss, weight=loss.weight * (1 - bad))
        return loss

    # For the poison "update" loss and gradient are fine, and the learning rate overflows at the two bad batches.
    overflows = lambda tokens: jnp.where(
        (tokens > 0) & (tokens < 3 * 4 * toy.LENGTH), jnp.inf, 1e-2
    )
    optimizer = AdamWConfig().build(by_tokens(overflows) if poison == "update" else 1e-2)
    step = jax.jit(make_train_step(loss_fn, optimizer, ema_decay=0.5))
    good = toy.batch_of(4) | {"bad": np.zeros(4, np.float32)}
    bad = good | {"bad": np.ones(4, np.float32)}
    first, _ = step(state_of(toy, optimizer, ema=True), good)
    second, metrics = step(first, bad)
    third, metrics_third = step(second, bad)
    fourth, metrics_fourth = step(third, good)
    for skipped in (second, third):
        equal(
            (skipped.model, skipped.opt_state, skipped.ema),
            (first.model, first.opt_state, first.ema),
        )
    assert [int(m["skipped_in_row"]) for m in (metrics, metrics_third, metrics_fourth)] == [1, 2, 0]
    assert [int(s.skipped) for s in (first, second, third, fourth)] == [0, 1, 2, 2]
    # The batch is consumed all the same.
    assert [int(s.step) for s in (first, second, third, fourth)] == [1, 2, 3, 4]
    assert int(fourth.tokens) == 4 * 4 * toy.LENGTH
    assert not np.array_equal(fourth.model.embedding.get_value(), third.model.embedding.get_value())


def test_accelerators_select_where_the_cpu_branches(toy):
    traced = jax.jit(make_train_step(toy.loss_fn, optax.sgd(0.1))).trace(
        state_of(toy, optax.sgd(0.1)), toy.batch_of(4)
    )
    branches = {
        p: traced.lower(lowering_platforms=(p,)).as_text().count("stablehlo.case")
        for p in ("cpu", "cuda", "tpu")
    }
    # The constant choices of the platform itself are in all three; on CPU there is a branch to look and one to write.
    assert branches["cpu"] == branches["cuda"] + 2 == branches["tpu"] + 2


def test_frozen_leaves_stay_and_have_no_optimizer_state(toy):
    optimizer = AdamWConfig().build(1e-1)
    state = state_of(toy, optimizer, trainable="blocks", ema=True)
    step = jax.jit(make_train_step(toy.loss_fn, optimizer, trainable="blocks", ema_decay=0.9))
    new, _ = step(state, toy.batch_of(4))
    equal(new.model.embedding.get_value(), state.model.embedding.get_value())
    assert not np.array_equal(
        new.model.blocks.kernel.get_value(), state.model.blocks.kernel.get_value()
    )
    assert not [
        leaf.name for leaf in named_leaves((new.opt_state, new.ema)) if "embedding" in leaf.name
    ]


def test_moving_average(toy):
    optimizer = optax.sgd(0.5)
    state = state_of(toy, optimizer, ema=True)
    step = jax.jit(make_train_step(toy.loss_fn, optimizer, ema_decay=0.75))
    new, _ = step(state, toy.batch_of(4))
    expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, state.model, new.model)
    close(ema_model(new), expected)


def test_learning_rate_by_tokens_follows_the_tokens(toy):
    schedule = ScheduleConfig(kind="linear", peak=1.0, total=1000, unit="tokens").build()
    optimizer = optax.chain(optax.scale(1.0), AdamWConfig(weight_decay=0.0).build(schedule))
    step = jax.jit(make_train_step(toy.loss_fn, optimizer, learning_rate=schedule))
    state, rates = state_of(toy, optimizer), []
    for rows in (8, 2, 4):
        state, metrics = step(state, toy.batch_of(rows))
        rates.append(float(metrics["learning_rate"]))
    seen = np.cumsum([0, 8, 2]) * toy.LENGTH
    np.testing.assert_allclose(rates, 1 - seen / 1000, rtol=1e-6)


def test_learning_rate_by_steps_counts_updates_made(toy):
    schedule = ScheduleConfig(kind="linear", peak=1.0, total=10).build()
    step = jax.jit(make_train_step(toy.loss_fn, optax.sgd(schedule), learning_rate=schedule))
    state = state_of(toy, optax.sgd(schedule))
    empty = toy.batch_of(4)
    empty["loss_weights"] = np.zeros_like(empty["loss_weights"])
    rates = []
    for batch in (toy.batch_of(4), empty, toy.batch_of(4), toy.batch_of(4)):
        state, metrics = step(state, batch)
        rates.append(float(metrics["learning_rate"]))
    np.testing.assert_allclose(rates, [1.0, 0.9, 0.9, 0.8], rtol=1e-6)


def test_one_device_and_eight_agree_and_micro_batches_stay_in_place(toy):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    optimizer = AdamWConfig().build(1e-2)
    step = jax.jit(make_train_step(without_key(toy), optimizer, accumulate=2, clip=Clip(0.1)))
    batch = toy.batch_of(16)
    single = state_of(toy, optimizer)
    spread = jax.device_put(single, jax.NamedSharding(mesh, jax.P()))
    shards = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))
    compiled = step.lower(spread, shards).compile()
    text = compiled.as_text()
    assert "all-reduce" in text
    assert "all-to-all" not in text
    assert "collective-permute" not in text
    assert "all-gather" not in text
    for _ in range(3):
        single, alone = step(single, batch)
        spread, together = step(spread, shards)
    np.testing.assert_allclose(alone["loss"], together["loss"], rtol=1e-5)
    close(single.model, spread.model, rtol=1e-4)


def test_state_beside_a_sharded_model_lies_on_its_mesh(toy):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    model = jax.device_put(toy.Toy(rngs=nnx.Rngs(0)), jax.NamedSharding(mesh, jax.P()))
    state = create_train_state(model, AdamWConfig().build(1e-2), key=jax.random.key(0), ema=True)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)} == {8}


def test_bfloat16_parameters_keep_their_type(toy):
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), toy.Toy(rngs=nnx.Rngs(0)))
    optimizer = AdamWConfig().build(1e-2)
    state = create_train_state(model, optimizer, key=jax.random.key(0))

    def loss_fn(model, batch, key):
        return toy.loss_fn(jax.tree.map(lambda x: x.astype(jnp.float32), model), batch, None)

    new, _ = jax.jit(make_train_step(loss_fn, optimizer, accumulate=2))(state, toy.batch_of(4))
    types = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]
    assert types(new.model) == types(model)
    assert types(new.opt_state) == types(state.opt_state)


def test_evaluation_is_the_mean_over_all_tokens(toy):
    model = toy.Toy(rngs=nnx.Rngs(0))
    batches = [
        toy.batch_of(8),
        toy.batch_of(3, 50),
        toy.batch_of(8, 100),
    ] * 7  # more than are held back at once
    metrics = evaluate(model, jax.jit(make_eval_step(toy.loss_fn)), batches, prefix="val_")
    sums = [toy.loss_fn(model, batch, None) for batch in batches[:3]]
    weight = sum(float(s.weight) for s in sums)
    np.testing.assert_allclose(
        metrics["val_loss"], sum(float(s.total) for s in sums) / weight, rtol=1e-6
    )
    np.testing.assert_allclose(
        metrics["val_accuracy"], sum(float(s.metrics["accuracy"]) for s in sums) / weight, rtol=1e-6
    )
    assert metrics["val_weight"] == 7 * weight
    with pytest.raises(ValueError, match="no batch"):
        evaluate(model, make_eval_step(toy.loss_fn), [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"ema_decay": 1.0}, "ema_decay must be in .*got 1.0"),
        ({"ema_decay": "abc"}, "ema_decay must be in .*got 'abc'"),
    ],
)
def test_bad_options(toy, options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        make_train_step(toy.loss_fn, optax.sgd(1.0), **options)


def test_bad_use_is_named_while_tracing(toy):
    state, batch = state_of(toy, optax.sgd(1.0)), toy.batch_of(6)
    with pytest.raises(ValueError, match=r"multiple of accumulate=4 micro-batches, got 6"):
        make_train_step(toy.loss_fn, optax.sgd(1.0), accumulate=4)(state, batch)
    with pytest.raises(ValueError, match=r"ema_decay=0\.9 does not match .*ema=False"):
        make_train_step(toy.loss_fn, optax.sgd(1.0), ema_decay=0.9)(state, batch)
    with pytest.raises(TypeError, match="must return Loss"):
        make_train_step(lambda model, batch, key: jnp.float32(0.0), optax.sgd(1.0))(state, batch)
    named = lambda model, batch, key: Loss(
        jnp.float32(0.0), jnp.float32(1.0), {"loss": jnp.float32(0.0)}
    )
    with pytest.raises(ValueError, match="reserved names, got loss"):
        make_train_step(named, optax.sgd(1.0))(state, batch)
    with pytest.raises(ValueError, match="ema=None"):
        ema_model(state)
