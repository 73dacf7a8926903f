import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effscale.training import AdamWConfig, ScheduleConfig, by_tokens
from effscale.training.schedules import scale_by_token_schedule


def reference(kind, t, peak=2.0, warmup=10, total=60, final=0.5):
    if t < warmup:
        return peak * t / warmup
    p = min((t - warmup) / (total - warmup), 1.0)
    return {
        "constant": peak,
        "linear": final + (peak - final) * (1 - p),
        "cosine": final + (peak - final) * (1 + math.cos(math.pi * p)) / 2,
        "inverse_sqrt": max(peak * math.sqrt(warmup / t), final),
    }[kind]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "inverse_sqrt"])
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_shape_of_each_kind(kind, dtype):
    schedule = ScheduleConfig(kind=kind, peak=2.0, warmup=10, total=60, final=0.5).build()
    counts = [0, 1, 9, 10, 11, 35, 59, 60, 61, 1000]
    values = jax.jit(jax.vmap(schedule.function))(np.array(counts, dtype))
    np.testing.assert_allclose(values, [reference(kind, t) for t in counts], rtol=1e-6)


def test_no_warmup_starts_at_the_peak():
    assert float(ScheduleConfig(kind="linear", peak=1.0, total=10).build()(0)) == 1.0


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "inverse_sqrt"])
def test_counts_of_billions_of_tokens(kind):
    billions = ScheduleConfig(
        kind=kind, peak=2.0, warmup=3 * 10**9, total=300 * 10**9, final=0.5, unit="tokens"
    ).build()
    ones = ScheduleConfig(kind=kind, peak=2.0, warmup=3, total=300, final=0.5).build()
    for count in (0.0, 1.5, 3.0, 100.0, 300.0, 500.0):
        value = jax.jit(billions)(jnp.float32(count * 1e9))
        np.testing.assert_allclose(value, ones(jnp.float32(count)), rtol=1e-6)
        np.testing.assert_allclose(billions(int(count * 1e9)), value, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "cosin"}, "kind must be one of .*cosine.*got 'cosin'"),
        ({"kind": "cosine"}, r"total must be .*, got None"),
        ({"kind": "linear", "warmup": 10, "total": 10}, r"total must be .*warmup=10, got 10"),
        ({"kind": "constant", "peak": -1.0}, r"peak must be .*, got -1\.0"),
        ({"kind": "constant", "peak": float("inf")}, r"peak must be a finite number, got inf"),
        ({"kind": "constant", "peak": float("nan")}, r"peak must be .*, got nan"),
        ({"kind": "constant", "peak": "abc"}, r"peak must be .*, got 'abc'"),
        ({"kind": "constant", "final": float("nan")}, r"final must be .*, got nan"),
        ({"kind": "constant", "warmup": -1}, r"warmup must be .*, got -1"),
        ({"kind": "constant", "warmup": float("inf")}, r"warmup must be .*, got inf"),
        ({"kind": "linear", "total": float("inf")}, r"total must be .*, got inf"),
        ({"kind": "constant", "peak": 0.1, "final": 0.2}, r"final must be .*peak=0\.1, got 0\.2"),
        ({"kind": "constant", "unit": "epochs"}, "unit must be one of .*tokens.*got 'epochs'"),
    ],
)
def test_bad_schedules(fields, message, unchecked):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("b1", 1.0),
        ("b2", -0.1),
        ("eps", 0.0),
        ("weight_decay", -1.0),
        *((field, float("nan")) for field in ("b1", "b2", "eps", "weight_decay")),
        *((field, float("inf")) for field in ("eps", "weight_decay")),
    ],
)
def test_bad_adamw(field, value):
    with pytest.raises(ValueError, match=rf"{field} must be .*, got {value}"):
        AdamWConfig(**{field: value})


@pytest.mark.parametrize("value", [float("inf"), float("nan"), np.float64("inf"), "abc", None])
def test_bad_learning_rates(value, unchecked):
    with pytest.raises(ValueError, match=f"learning_rate must be .*got {re.escape(repr(value))}"):
        AdamWConfig().build(value)


def test_steps_in_tokens_keep_the_schedule_when_batches_shrink():
    in_steps = ScheduleConfig(kind="linear", peak=1.0, warmup=4, total=20).build()
    in_tokens = by_tokens(in_steps, tokens_per_step=512)
    assert in_tokens.unit == "tokens"
    assert float(in_tokens(512 * 12)) == float(in_steps(12))
    assert float(in_tokens(256 * 12)) == float(in_steps(6))
    with pytest.raises(ValueError, match=r"tokens_per_step must be .*got 0"):
        by_tokens(in_steps, 0)


def test_token_schedule_needs_tokens():
    transform = scale_by_token_schedule(lambda tokens: tokens)
    with pytest.raises(ValueError, match="tokens="):
        transform.update(jnp.ones(1), transform.init(jnp.ones(1)))


def test_adamw_is_optax_adamw():
    params = {"kernel": jnp.arange(1.0, 5.0), "bias": jnp.ones(2)}
    config = AdamWConfig(b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.3)
    ours = config.build(0.1)
    theirs = optax.adamw(
        0.1, 0.8, 0.9, 1e-6, weight_decay=0.3, mask={"kernel": True, "bias": False}
    )
    states = ours.init(params), theirs.init(params)
    gradients = {"kernel": jnp.array([1.0, -2.0, 3.0, 0.0]), "bias": jnp.array([0.1, -0.1])}
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(3):
            a, first = ours.update(gradients, states[0], params)
            b, second = theirs.update(gradients, states[1], params)
            states = first, second
            jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_last_link_itself_is_taken_as_it_is():
    link = optax.scale(-0.25)
    optimizer = AdamWConfig(weight_decay=0.0).build(link)
    params = {"w": jnp.ones(3)}
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integers with floats
        updates, _ = optimizer.update({"w": jnp.full(3, 2.0)}, optimizer.init(params), params)
    # Adam's first update has the size of 1.
    np.testing.assert_allclose(updates["w"], -0.25, rtol=1e-4)
