import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effscale.curriculum.instability import with_metrics
from effscale.curriculum.learning_rate import current_learning_rate, steps_then_tokens
from effscale.training import Loss, create_train_state, make_train_step


def rates_by_hand(kind, peak, w, total, final, tokens_per_step):
    """Warmup by steps; the tokens at its end are where the decay by tokens counts from."""
    rates, x, x_w = [], 0, 0
    for n, tokens in enumerate(tokens_per_step):
        if n == w:
            x_w = x
        if n < w:
            rate = peak * n / w
        elif x > total:
            rate = final
        elif kind == "inverse_sqrt":
            rate = max(peak * math.sqrt(max(x_w, 1) / max(x, 1)), final)
            rate = min(rate, peak)
        else:
            p = (x - x_w) / max(total - x_w, 1)
            shape = 1 - p if kind == "linear" else 0.5 * (1 + math.cos(math.pi * p))
            rate = final + (peak - final) * shape
        rates.append(rate)
        x += tokens
    return rates


@given(
    kind=st.sampled_from(["linear", "cosine", "inverse_sqrt"]),
    w=st.integers(0, 4),
    final=st.sampled_from([0.0, 0.25]),
    total=st.integers(1, 120),
    tokens=st.lists(st.integers(1, 20), min_size=1, max_size=12),
)
def test_rates_are_those_of_the_rule(kind, w, final, total, tokens):
    transform = steps_then_tokens(
        peak=2.0, warmup_steps=w, total_tokens=total, kind=kind, final=final
    )
    state, seen, found, reported = transform.init(None), 0, [], []
    for each in tokens:
        updates, state = transform.update(jnp.float32(1.0), state, tokens=jnp.float32(seen))
        found.append(-float(updates))
        reported.append(float(state.learning_rate))
        seen += each
    expected = rates_by_hand(kind, 2.0, w, total, final, tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert found == reported


def test_a_paper_sized_run():
    # 157.3 billion tokens and 3000 steps of warmup; the first steps have 64 of 1024 tokens a row, 4096 rows.
    transform = steps_then_tokens(
        peak=6e-4, warmup_steps=3000, total_tokens=157_286_400_000, kind="linear"
    )
    state = transform.init(None)
    origin = 3000 * 4096 * 64
    rates = []
    for count, tokens in ((1500, origin / 2), (3000, origin), (9000, 80_000_000_000)):
        state = state._replace(count=jnp.int32(count))
        _, state = transform.update(jnp.ones(2), state, tokens=jnp.float32(tokens))
        rates.append(float(state.learning_rate))
    share = (80_000_000_000 - origin) / (157_286_400_000 - origin)
    np.testing.assert_allclose(rates, [3e-4, 6e-4, 6e-4 * (1 - share)], rtol=1e-5)


def toy_loss(model, batch, key=None):
    return Loss(jnp.sum(model["w"] * batch["scale"]), jnp.float32(batch["input_ids"].size))


def test_a_training_step_reports_it_and_skipped_updates_do_not_count():
    schedule = steps_then_tokens(peak=1.0, warmup_steps=2, total_tokens=100, kind="linear")
    optimizer = optax.chain(optax.clip(1.0), schedule)
    report = lambda state: current_learning_rate(state.opt_state)
    step = jax.jit(with_metrics(make_train_step(toy_loss, optimizer), report))
    state = create_train_state({"w": jnp.ones(4)}, optimizer, key=jax.random.key(0))
    rates = []
    for scale in (1.0, math.nan, 1.0, 1.0, 1.0):
        batch = {"input_ids": jnp.ones((2, 5), jnp.int32), "scale": jnp.float32(scale)}
        state, metrics = step(state, batch)
        rates.append(float(metrics["learning_rate"]))
    # The second update is skipped. Tokens before the others: 0, 20, 30, 40; the decay counts from 30.
    np.testing.assert_allclose(rates, [0.0, 0.0, 0.5, 1.0, 1 - 10 / 70], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "constant"}, "kind must be one of .*inverse_sqrt, got 'constant'"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative, got -1"),
        ({"total_tokens": 0}, "total_tokens must be at least 1, got 0"),
        ({"peak": -1.0}, r"peak must be .*, got -1\.0"),
        ({"final": 2.0}, r"final must be .*peak=1\.0, got 2\.0"),
    ],
)
def test_bad_schedules(fields, message, unchecked):
    with pytest.raises(ValueError, match=message):
        steps_then_tokens(**{"peak": 1.0, "warmup_steps": 1, "total_tokens": 9, **fields})


def test_what_is_missing_is_named():
    transform = steps_then_tokens(peak=1.0, warmup_steps=1, total_tokens=9)
    with pytest.raises(ValueError, match="tokens="):
        transform.update(jnp.ones(1), transform.init(None))
    with pytest.raises(ValueError, match="one schedule of steps_then_tokens, got 0"):
        current_learning_rate(optax.adam(0.1).init(jnp.ones(1)))
