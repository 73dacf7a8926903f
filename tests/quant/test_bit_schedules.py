"""Bits that fall in training."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effscale.models import Dense, Transformer, gpt2
from effscale.quant import (
    BitSchedule,
    Format,
    Recipe,
    Rule,
    at_step,
    fake_quantize,
    fake_quantize_at,
    fake_quantize_model,
    quantize_model,
    scheduled_step,
)
from effscale.training import Loss, create_train_state, make_train_step

W = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)
TENSOR = {"granularity": "tensor", "spread": "paper"}


def test_the_golden_schedule():
    """DeepSpeed's MoQ: from 12 to 8 with a period of 50 bits drop after 50, 100, 200 and 400 updates."""
    schedule = BitSchedule(start_bits=12, target_bits=8, period=50)
    assert schedule.drops == (50, 100, 200, 400)
    assert [schedule.bits(t) for t in (0, 49, 50, 99, 100, 199, 200, 399, 400, 10**6)] == [
        *(12, 12, 11, 11, 10, 10, 9, 9, 8, 8)
    ]


def by_counting(start, target, period, offset, step):
    """As in DeepSpeed's loop: each update may take one bit off, and then the period doubles."""
    if step < offset:
        return 32
    bits = start
    for count in range(step - offset + 1):
        if bits != target and count >= period:
            period, bits = 2 * period, bits - 1
    return bits


@hypothesis.given(
    bits=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    period=st.integers(1, 9),
    offset=st.integers(0, 20),
    steps=st.lists(st.integers(0, 200), min_size=4, max_size=4),
)
def test_bits_are_those_of_the_loop(bits, period, offset, steps):
    schedule = BitSchedule(
        start_bits=max(bits), target_bits=min(bits), period=period, offset=offset
    )
    expected = [by_counting(max(bits), min(bits), period, offset, step) for step in steps]
    assert [schedule.bits(step) for step in steps] == expected
    assert schedule.bits(jnp.array(steps)).tolist() == expected
    assert schedule.bits(schedule.end) == min(bits)


def test_golden_values_of_all_bits_by_one_program():
    """The values of DeepSpeed's quantizers in 8 and 4 bits, ternary and binary, at the steps where the bits are these."""
    x = jnp.array([[-1.0, -0.5, 0.0, 0.25, 0.9, 1.0]])
    schedule = BitSchedule(start_bits=8, target_bits=1, period=1, offset=3)
    at = jax.jit(lambda x, t: fake_quantize_at(x, Format(bits=1, **TENSOR), schedule, t))
    when = {bits: next(t for t in range(99) if schedule.bits(t) == bits) for bits in range(1, 9)}
    found = lambda t: np.asarray(at(x, jnp.int32(t)))[0]
    np.testing.assert_array_equal(found(2), x[0])
    np.testing.assert_array_equal(found(when[8]), [-1, -0.5, 0, 0.25, 0.8984375, 0.9921875])
    np.testing.assert_array_equal(found(when[4]), [-1, -0.5, 0, 0.25, 0.875, 0.875])
    np.testing.assert_allclose(found(when[2]), [-0.85, -0.85, 0, 0, 0.85, 0.85], rtol=1e-6)
    # A zero becomes the scale, as one bit has no third value.
    a = 3.65 / 6
    np.testing.assert_allclose(found(when[1]), [-a, -a, a, a, a, a], rtol=1e-6)
    assert at._cache_size() == 1


def in_numpy(x, bits, symmetric, axis):
    """Uniform integers with the scale of the paper."""
    q = 2.0**bits
    if symmetric:
        s = 2 * np.abs(x).max(axis, keepdims=True) / q
        return np.clip(np.round(x / s), -q / 2, q / 2 - 1) * s
    low = x.min(axis, keepdims=True)
    s = (x.max(axis, keepdims=True) - low) / q
    z = np.round(low / s) * s
    return np.clip(np.round((x - z) / s), 0, q - 1) * s + z


@pytest.mark.parametrize("symmetric", [True, False])
def test_bits_between_those_that_can_be_stored(symmetric):
    """12, 11, 10 and 9 bits, per channel, of two stacked kernels that stand at steps of their own."""
    format = Format(bits=8, symmetric=symmetric, spread="paper")
    schedule = BitSchedule(start_bits=12, target_bits=8, period=50)
    stack = np.stack([W, 3 * W + 1])
    for steps in [(0, 60), (150, 399), (400, 200)]:
        found = fake_quantize_at(jnp.asarray(stack), format, schedule, jnp.array(steps))
        for kernel, step, one in zip(stack, steps, found, strict=True):
            expected = in_numpy(kernel.astype(np.float64), schedule.bits(step), symmetric, 0)
            scale = np.abs(kernel).max() / 2 ** (schedule.bits(step) - 1)
            # A number half-way between two codes may go either way in float32.
            np.testing.assert_allclose(one, expected, atol=1.01 * scale)
            assert np.mean(np.abs(one - expected) > 1e-5) < 0.02


@pytest.mark.parametrize(
    "format",
    [
        Format(bits=4, granularity="group", group_size=4),
        Format(bits=4, granularity="block", num_blocks=2, symmetric=False, spread="centered"),
        Format(bits=2, granularity="block", num_blocks=4),
    ],
    ids=lambda format: format.describe(),
)
def test_in_the_end_it_is_the_format_itself(format):
    schedule = BitSchedule(start_bits=6, target_bits=format.bits, period=2)
    at = jax.jit(lambda x, t: fake_quantize_at(x, format, schedule, t))
    x = jnp.asarray(W)
    np.testing.assert_allclose(at(x, schedule.end), fake_quantize(x, format), rtol=1e-6, atol=1e-7)
    assert jnp.abs(at(x, schedule.end - 1) - fake_quantize(x, format)).max() > 1e-3


def test_mixed_weights_and_gradients():
    """After a change of bits the rounded weight comes in bit by bit, and the gradient is that of the weight itself."""
    format = Format(bits=3, **TENSOR)
    schedule = BitSchedule(start_bits=4, target_bits=3, period=8, change_ratio=0.25)
    x = jnp.asarray(W)
    for step, bits, rho in [(0, 4, 1.0), (3, 4, 0.25), (7, 4, 0.0), (8, 3, 1.0), (10, 3, 0.5)]:
        rounded = in_numpy(W, bits, True, None)
        found = fake_quantize_at(x, format, schedule, step)
        np.testing.assert_allclose(found, rho * W + (1 - rho) * rounded, atol=1e-6)
    assert schedule.end == 12
    np.testing.assert_allclose(
        fake_quantize_at(x, format, schedule, 12), fake_quantize(x, format), atol=1e-6
    )
    loss = lambda x: jnp.sum(fake_quantize_at(x, format, schedule, jnp.int32(9)) * x[::-1])
    g = jax.grad(loss)(x)
    values = fake_quantize_at(x, format, schedule, 9)
    np.testing.assert_allclose(g, x[::-1] + values[::-1], rtol=1e-6)


RECIPE = Recipe(
    (
        Rule(
            where="kernel",
            weights=Format(bits=4),
            schedule=BitSchedule(start_bits=8, target_bits=4, period=1, offset=1),
            activations=Format(granularity="token"),
            activations_offset=2,
        ),
    )
)


def test_a_training_step_follows_the_schedule():
    """One compilation for all bits; what is skipped does not count; nothing is packed before the end."""

    def loss(model, x, key):
        return Loss(jnp.square(model(x) - 1.0).sum(), jnp.float32(x.size))

    model = fake_quantize_model(Dense(12, 8, rngs=nnx.Rngs(0)), RECIPE)
    optimizer = optax.sgd(0.1)
    state = create_train_state(model, optimizer, key=jax.random.key(0))
    step = jax.jit(scheduled_step(make_train_step(loss, optimizer)))
    x = jnp.asarray(W[:4].T[:, :4].repeat(3, 1))
    state, _ = step(state, x)
    state, metrics = step(state, jnp.full_like(x, jnp.nan))
    assert int(metrics["skipped"]) == 1
    weight = state.model.kernel.get_value()
    assert (int(state.step), int(weight.step)) == (2, 1)
    # At step 1 weights are in 8 bits, and inputs are not rounded yet.
    expected = x @ fake_quantize(weight.latent, Format(bits=8)) + state.model.bias.get_value()[None]
    np.testing.assert_allclose(state.model(x), expected, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"kernel: at step 1 .* in 8 bits; they reach 4 bits at step 9"
    ):
        quantize_model(state.model, RECIPE)
    for _ in range(8):
        state, _ = step(state, x)
    assert step._cache_size() == 1
    packed = quantize_model(state.model, RECIPE)
    np.testing.assert_allclose(packed(x), state.model(x), atol=1e-5)
    early = quantize_model(at_step(model, 9), RECIPE)  # knowing what one does
    assert early.kernel.get_value().format.bits == 4


def test_schedules_by_layer_split_the_group():
    config = gpt2(num_layers=3, d_model=8, num_heads=2, vocab_size=16, max_length=8)
    model = Transformer(config, rngs=nnx.Rngs(0))
    late = BitSchedule(start_bits=8, target_bits=2, period=4, offset=10)
    rules = (
        Rule(where=r"layers\.2\..*up\.kernel", weights=Format(bits=2), schedule=late),
        Rule(where=r"layers\..*up\.kernel", weights=Format(bits=2)),
    )
    fake = fake_quantize_model(model, Recipe(rules))
    assert [group.repeat for group in fake.config.groups] == [2, 1]
    last = lambda model: model.groups[1].blocks[0].feed_forward.up.kernel.get_value()
    np.testing.assert_array_equal(last(fake).dense(), last(fake).latent)
    plain = Recipe((Rule(where=r"layers\..*up\.kernel", weights=Format(bits=2)),))
    whole = fake_quantize_model(model, plain).groups[0].blocks[0].feed_forward.up.kernel
    np.testing.assert_allclose(
        last(at_step(fake, late.end)).dense()[0], whole.get_value().dense()[2], atol=1e-6
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_bits": 0}, r"BitSchedule\.target_bits must be .*, got 0"),
        ({"start_bits": 2}, r"BitSchedule\.start_bits must be from target_bits=4 to 16.*, got 2"),
        ({"start_bits": 17}, r"start_bits must be .*, got 17"),
        ({"period": 0}, r"period must be from 1 to 2147483647, got 0"),
        ({"period": 1.5}, r"period must be .*, got 1\.5"),
        ({"offset": -1}, r"offset must be .*, got -1"),
        ({"change_ratio": 0.0}, r"change_ratio must be .*, got 0\.0"),
        ({"change_ratio": float("nan")}, r"change_ratio must be .*, got nan"),
    ],
    ids=str,
)
def test_impossible_schedules(fields, message, unchecked):
    with pytest.raises(ValueError, match=message):
        BitSchedule(**{"start_bits": 8, "target_bits": 4, **fields})


def test_a_schedule_of_other_bits_than_the_format():
    schedule = BitSchedule(start_bits=8, target_bits=4)
    with pytest.raises(ValueError, match=r"Rule\('kernel'\): .*target_bits=4.* bits=8"):
        Rule(where="kernel", weights=Format(bits=8), schedule=schedule)
    with pytest.raises(ValueError, match="schedule must be left at its default if weights is None"):
        Rule(where="kernel", weights=None, schedule=schedule)
    eight = dataclasses.replace(schedule, target_bits=8)
    with pytest.raises(ValueError, match="float8"):
        Rule(where="kernel", weights=Format(floating=True), schedule=eight)
    with pytest.raises(ValueError, match=r"activations_offset must be .*, got -1"):
        Rule(where="kernel", weights=Format(), activations_offset=-1)
