"""Random-LTD in training: the schedule, the batch that carries it, and what a run counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effscale.ltd import RandomLTD, mslg, token_dropping
from effscale.ltd.schedule import KeptTokens
from effscale.models import gpt2
from effscale.parallel import MeshConfig, shard_batch
from effscale.training import (
    AdamWConfig,
    Checkpoints,
    DiscretePacing,
    Loss,
    ScheduleConfig,
    StagedStep,
    create_train_state,
    evaluate,
    make_eval_step,
    make_train_step,
    named_leaves,
    next_token_loss,
)

LTD = RandomLTD(pacing=mslg(min_value=4, max_value=12, require_steps=6, seq_per_step=4))


def rows(batch=4, seq=12):
    ids = np.random.default_rng(2).integers(0, 37, (batch, seq + 1)).astype(np.int32)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def state_of(model, optimizer):
    return create_train_state(model, optimizer, key=jax.random.key(3))


def test_monotonic_sequence_length_growth():
    growth = mslg(min_value=128, max_value=2048, require_steps=200_000, seq_per_step=16)
    golden = {0: 128, 1666: 128, 1667: 144, 100_000: 1088, 199_999: 2032, 200_000: 2048}
    assert {t: growth(t) for t in golden} == golden
    assert len(growth.levels) == 121
    kept = RandomLTD(pacing=growth).stages()  # steps count from 0
    assert {t: kept(t) for t in golden} == golden
    assert len(mslg(min_value=128, max_value=2048, require_steps=10).levels) <= 14


def test_clocks():
    pacing = lambda clock: mslg(
        min_value=4, max_value=12, require_steps=96, seq_per_step=4, clock=clock
    )
    samples, tokens = (RandomLTD(pacing=pacing(clock)) for clock in ("samples", "tokens"))
    assert samples.stages(batch_size=8).starts == (0, 6, 12)
    assert tokens.stages(batch_size=2, length=12).starts == (0, 2, 4)
    with pytest.raises(ValueError, match="needs batch_size"):
        samples.stages()
    with pytest.raises(ValueError, match="length=None"):
        tokens.stages(batch_size=2)


def test_the_number_is_in_the_structure():
    batch = LTD.shape_batch(rows(), 8)
    assert len(jax.tree.leaves(batch)) == 2
    same = jax.tree.map(lambda x: x[:2], batch)
    assert same["kept_tokens"] == KeptTokens(8)
    assert jax.tree.structure(batch) != jax.tree.structure(LTD.shape_batch(rows(), 4))
    mesh = MeshConfig(data=4).build(jax.devices()[:4])
    assert shard_batch(batch, mesh)["kept_tokens"] == KeptTokens(8)


def test_one_program_for_all_that_drops_nothing():
    """A row that a curriculum has cut below the schedule."""
    batches = [LTD.shape_batch(rows(seq=6), kept) for kept in (6, 8, 12)]
    assert len({jax.tree.structure(batch) for batch in batches}) == 1


def test_rows_that_would_never_be_seen_whole_are_refused():
    last = LTD.pacing(LTD.pacing.end)
    with pytest.raises(ValueError, match=f"must end at the row length {last + 1}, got {last}"):
        LTD.shape_batch(rows(seq=last + 1), 4)


@pytest.mark.parametrize(
    ("options", "batch", "message"),
    [
        ({}, {"tokens": (4, 16)}, r"must have input_ids .* got tokens \(4, 16\).*field="),
        ({"field": "tokens"}, {"tokens": (4, 16)}, "must end at the row length 16, got 12"),
        ({"field": "tokens"}, {"tokens": (4, 12)}, None),
        ({}, {"images": (4, 8, 8, 3), "labels": (4,)}, None),
        ({"field": None}, {"pixels": (4, 8, 8, 3)}, None),
    ],
)
def test_rows_of_any_name_are_checked(options, batch, message):
    ltd = RandomLTD(pacing=LTD.pacing, **options)
    batch = {name: np.zeros(shape, np.int32) for name, shape in batch.items()}
    if message is None:
        assert ltd.shape_batch(batch, 4)["kept_tokens"] == KeptTokens(4)
    else:
        with pytest.raises(ValueError, match=message):
            ltd.shape_batch(batch, 4)


def test_tokens_of_another_name_are_counted():
    ltd = RandomLTD(pacing=LTD.pacing, field="tokens")
    batch = ltd.shape_batch({"tokens": np.zeros((4, 12), np.int32)}, 4)
    assert ltd.tokens_per_batch(config())(batch) == 4 * (12 + 4) // 2


def test_a_model_of_ones_own_is_told_the_way():
    zero = Loss(jnp.float32(0), jnp.float32(1))
    loss = LTD.loss(lambda params, batch, key, run_group=None: zero)
    batch, key = LTD.shape_batch(rows(), 4), jax.random.key(0)
    with pytest.raises(TypeError, match=r"got a dict.*sample_kept, take_tokens and put_tokens"):
        loss({"kernel": jnp.ones(2)}, batch, key)
    assert loss({"kernel": jnp.ones(2)}, batch, None) is zero


def test_what_is_frozen_is_passed_on():
    zero = Loss(jnp.float32(0), jnp.float32(1))
    loss = LTD.loss(lambda model, batch, key, teacher: {"teacher": zero}[teacher])
    assert loss(None, rows(), None, "teacher") is zero


def test_dropping_needs_a_key_and_a_shaped_batch(tiny):
    model, loss = tiny("gpt2"), LTD.loss(next_token_loss)
    key, batch = jax.random.key(0), jax.tree.map(jnp.asarray, rows())
    shaped = LTD.shape_batch(batch, 4)
    whole = next_token_loss(model, batch, None).total
    for same in (loss(model, batch, None), loss(model, shaped, None), loss(model, batch, key)):
        assert same.total == whole
    runner = token_dropping(model.config, kept=4, key=key)
    expected = next_token_loss(model, batch, key, run_group=runner).total
    assert loss(model, shaped, key).total == expected
    assert abs(expected - whole) > 1e-2
    assert loss(model, shaped, key, z_loss=0.1).total > expected


def test_evaluation_sees_all_tokens(tiny):
    model = tiny("gpt2")
    steps = [jax.jit(make_eval_step(f)) for f in (LTD.loss(next_token_loss), next_token_loss)]
    found, expected = (evaluate(model, step, [rows()]) for step in steps)
    assert found == expected


def test_micro_batches_drop_different_tokens(tiny):
    """The same row twice."""
    model, optimizer = tiny("gpt2"), optax.sgd(1e-3)
    batch = jax.tree.map(lambda x: np.concatenate([x, x]), rows(batch=1))
    loss = LTD.loss(next_token_loss)
    step = make_train_step(loss, optimizer, accumulate=2)
    state = state_of(model, optimizer)
    _, metrics = jax.jit(step)(state, LTD.shape_batch(batch, 4))
    row = LTD.shape_batch(jax.tree.map(jnp.asarray, rows(batch=1)), 4)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(3), 0), 2)
    one, two = (loss(model, row, key).total for key in keys)
    np.testing.assert_allclose(metrics["loss"], (one + two) / 24, rtol=1e-5)
    assert abs(one - two) > 1e-2


def test_a_run(tiny, tmp_path):
    """LayerToken learning rate, layer tokens counted, one compilation a stage, a checkpoint of plain names.

    Four layers, two of which drop; four rows of 12 tokens; 4, 8 and from step 6 on all 12 tokens are kept.
    """
    model = tiny("gpt2")
    names = [leaf.name for leaf in named_leaves(model)]
    schedule = ScheduleConfig(
        kind="linear", peak=1e-3, warmup=100, total=300, final=1e-4, unit="tokens"
    ).build()
    optimizer = AdamWConfig().build(schedule)
    step = make_train_step(
        LTD.loss(next_token_loss),
        optimizer,
        tokens_per_batch=LTD.tokens_per_batch(model.config),
        learning_rate=schedule,
    )
    staged = StagedStep(step, LTD.stages(), LTD.shape_batch)
    state, rates = state_of(model, optimizer), []
    for number in range(8):
        state, metrics = staged(state, staged.before_step(number, rows()))
        rates.append(float(metrics["learning_rate"]))

    layer_tokens, expected = 0, []  # of all layers, as the paper sums them
    for number in range(8):
        warmup, total = 100 * 4, 300 * 4
        if layer_tokens < warmup:
            expected.append(1e-3 * layer_tokens / warmup)
        else:
            ratio = min((layer_tokens - warmup) / (total - warmup), 1.0)
            expected.append(1e-4 + (1e-3 - 1e-4) * (1 - ratio))
        kept = [4, 4, 4, 8, 8, 8, 12, 12][number]
        layer_tokens += 4 * (kept * 2 + 12 * 2)
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    assert rates.index(max(rates)) not in (0, 7)
    assert int(state.tokens) == layer_tokens // 4
    assert staged.num_compilations == 3
    staged.close()

    assert [leaf.name for leaf in named_leaves(state.model)] == names
    checkpoints = Checkpoints(tmp_path, every=1)
    checkpoints.save(8, state, force=True)
    checkpoints.wait()
    plain = create_train_state(tiny("gpt2"), optimizer, key=jax.random.key(3))
    restored = checkpoints.restore(plain).state
    jax.tree.map(np.testing.assert_array_equal, restored.model, state.model)


def config(length=12, num_layers=4):
    return gpt2(num_layers=num_layers, d_model=16, num_heads=2, vocab_size=37, max_length=length)


@pytest.mark.parametrize(
    ("length", "num_layers", "message"),
    [
        (16, 4, "row length 16, got 12 kept tokens, so it never reaches the whole row"),
        (8, 4, "row length 8, got 12 kept tokens, more than the row has"),
        (12, 2, "at least 3 layers"),
    ],
)
def test_a_schedule_that_does_not_suit_the_model(length, num_layers, message):
    with pytest.raises(ValueError, match=message):
        LTD.check(config(length, num_layers))
    LTD.check(config())
    with pytest.raises(ValueError, match=r"row length 10, .*more than the row has"):
        LTD.check(config(), length=10)


def test_no_tokens_are_too_few():
    with pytest.raises(ValueError, match="at least 1 token"):
        RandomLTD(pacing=DiscretePacing(difficulty=(0, 12), max_step=(5,)))
