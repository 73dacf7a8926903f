import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effscale.curriculum.instability import (
    LossRatioWriter,
    loss_ratio,
    unstable_steps,
    variance_metrics,
    with_metrics,
)
from effscale.training import (
    AdamWConfig,
    JsonlWriter,
    Loss,
    create_train_state,
    fit,
    make_train_step,
    read_jsonl,
)
from effscale.training.metrics import MetricsWriter

losses = st.lists(
    st.one_of(st.floats(0.1, 100.0), st.sampled_from([float("nan"), float("inf")])), max_size=20
)


def ratios_by_hand(losses):
    out = []
    for t, loss in enumerate(losses):
        before = [x for x in losses[:t] if np.isfinite(x)]
        out.append(loss / min(before) if before else (1.0 if np.isfinite(loss) else loss))
    return out


@given(losses)
def test_loss_ratio_and_unstable_steps(losses):
    expected = ratios_by_hand(losses)
    found = loss_ratio(np.array(losses, np.float64))
    finite = np.isfinite(losses) if losses else np.zeros(0, bool)
    np.testing.assert_array_equal(found[finite], np.array(expected)[finite])
    assert not np.isfinite(found[~finite]).any()
    unstable = sum(not np.isfinite(x) or r > 1.2 for x, r in zip(losses, expected, strict=True))
    assert unstable_steps(np.array(losses, np.float64)) == unstable


def test_float32_losses_are_compared_in_float64():
    found = loss_ratio(np.array([3.0, 1.1], np.float32))
    assert found.dtype == np.float64
    assert found[1] == float(np.float32(1.1)) / 3.0


class Memory:
    def __init__(self):
        self.records, self.calls = [], []

    def write(self, step, values, timing=None):
        self.records.append({"step": step, **values})
        self.calls.append(timing)

    def flush(self):
        self.calls.append("flush")

    def close(self):
        self.calls.append("close")


def test_the_writer_hands_all_on():
    memory = Memory()
    writer = LossRatioWriter(memory)
    assert isinstance(writer, MetricsWriter)
    writer.write(1, {"loss": 2.0}, {"seconds": 1.0})
    writer.write(1, {"val_loss": 1.0})
    writer.write(2, {"loss": 3.0, "other": 1})
    writer.flush()
    writer.close()
    assert memory.records == [
        {"step": 1, "loss": 2.0, "loss_ratio": 1.0},
        {"step": 1, "val_loss": 1.0},
        {"step": 2, "loss": 3.0, "other": 1, "loss_ratio": 1.5},
    ]
    assert memory.calls == [{"seconds": 1.0}, None, None, "flush", "close"]


@given(losses=losses, killed=st.integers(0, 20), lost=st.integers(0, 3))
def test_a_resumed_run_writes_what_an_uninterrupted_one_does(
    tmp_path_factory, losses, killed, lost
):
    folder = tmp_path_factory.mktemp("run")

    def run(writer, steps):
        for step in steps:
            writer.write(step, {"loss": losses[step - 1]})
        writer.close()

    everything = range(1, len(losses) + 1)
    run(LossRatioWriter(JsonlWriter(folder / "whole.jsonl")), everything)
    killed = min(killed, len(losses))
    saved = max(killed - lost, 0)  # the steps since the last checkpoint are run again
    run(LossRatioWriter(JsonlWriter(folder / "parts.jsonl")), everything[:killed])
    writer = JsonlWriter(folder / "parts.jsonl", resume_step=saved)
    run(LossRatioWriter(writer, read_jsonl(folder / "parts.jsonl")), everything[saved:])
    assert (folder / "parts.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()
    written = [record["loss_ratio"] for record in read_jsonl(folder / "whole.jsonl")]
    expected = [r if np.isfinite(r) else None for r in loss_ratio(np.array(losses, np.float64))]
    assert written == expected


PARAMS = {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}
GRADIENTS = [
    {"kernel": jnp.linspace(-1.0, 2.0, 6).reshape(2, 3), "bias": jnp.array([0.5, -3.0, 0.0])},
    {"kernel": jnp.full((2, 3), 0.1), "bias": jnp.array([1.0, 1.0, -1.0])},
]


def variance_by_hand(names, b2):
    v = {name: np.zeros(PARAMS[name].shape) for name in names}
    for gradient in GRADIENTS:
        v = {name: b2 * v[name] + (1 - b2) * np.asarray(gradient[name]) ** 2 for name in names}
    roots = [root for name in names for root in np.sqrt(v[name]).ravel()]
    return sum(roots), max(roots)


OPTIMIZERS = {
    "adam": (optax.scale_by_adam(b2=0.9), ("kernel", "bias")),
    "chain": (optax.adam(0.1, b2=0.9), ("kernel", "bias")),
    "clipped": (
        optax.chain(optax.clip_by_global_norm(1e9), optax.adamw(0.1, b2=0.9)),
        ("kernel", "bias"),
    ),
    "ours": (AdamWConfig(b2=0.9).build(0.1), ("kernel", "bias")),
    "masked": (
        optax.masked(optax.adam(0.1, b2=0.9), {"kernel": True, "bias": False}),
        ("kernel",),
    ),
    "partitioned": (
        optax.partition(
            {"a": optax.adam(0.1, b2=0.9), "b": optax.sgd(0.1, momentum=0.9)},
            {"kernel": "b", "bias": "a"},
        ),
        ("bias",),
    ),
    "two": (
        optax.partition(
            {"a": optax.adam(0.1, b2=0.9), "b": optax.adam(0.2, b2=0.9)},
            {"kernel": "b", "bias": "a"},
        ),
        ("kernel", "bias"),
    ),
    "finite": (optax.apply_if_finite(optax.adam(0.1, b2=0.9), 3), ("kernel", "bias")),
    "injected": (
        optax.inject_hyperparams(optax.adam, static_args="b2")(learning_rate=0.1, b2=0.9),
        ("kernel", "bias"),
    ),
    "multi-steps": (optax.MultiSteps(optax.adam(0.1, b2=0.9), 1), ("kernel", "bias")),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_variance_is_found_wherever_adam_is(name):
    optimizer, names = OPTIMIZERS[name]
    state = optimizer.init(PARAMS)
    with jax.numpy_dtype_promotion("standard"):
        for gradient in GRADIENTS:
            _, state = optimizer.update(gradient, state, PARAMS)
    found = variance_metrics(state)
    norm, largest = variance_by_hand(names, 0.9)
    np.testing.assert_allclose(float(found["variance_norm"]), norm, rtol=1e-5)
    np.testing.assert_allclose(float(found["variance_max"]), largest, rtol=1e-5)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.1, momentum=0.9),
        optax.rmsprop(0.1),  # has a nu, too
        optax.amsgrad(0.1),
        optax.masked(optax.adam(0.1), {"kernel": False, "bias": False}),
    ],
)
def test_without_adam_there_is_no_variance(optimizer):
    with pytest.raises(ValueError, match=r"no optax\.ScaleByAdamState"):
        variance_metrics(optimizer.init(PARAMS))


def test_low_precision_moments_are_added_in_float32():
    state = optax.scale_by_adam().init({"w": jnp.zeros(4096, jnp.bfloat16)})
    state = state._replace(nu={"w": jnp.full(4096, 0.25, jnp.bfloat16)})
    found = variance_metrics(state)
    assert found["variance_norm"].dtype == jnp.float32
    assert float(found["variance_norm"]) == 2048.0


def toy_loss(model, batch, key=None):
    return Loss(jnp.sum((batch @ model["w"] - 1.0) ** 2), jnp.float32(batch.shape[0]))


def test_a_run_logs_all_of_it():
    optimizer = optax.adam(0.3)
    report = lambda state: variance_metrics(state.opt_state)
    step = jax.jit(with_metrics(make_train_step(toy_loss, optimizer), report))
    state = create_train_state({"w": jnp.zeros(3)}, optimizer, key=jax.random.key(0))
    batches = np.random.default_rng(0).standard_normal((6, 4, 3)).astype(np.float32)
    memory = Memory()
    result = fit(state, step, iter(batches), num_steps=6, writer=LossRatioWriter(memory))
    written = np.array([record["loss"] for record in memory.records])
    assert [record["loss_ratio"] for record in memory.records] == ratios_by_hand(written.tolist())
    last = variance_metrics(result.state.opt_state)
    for name, value in last.items():
        np.testing.assert_allclose(memory.records[-1][name], float(value), rtol=1e-6)
    assert step.__name__ == "train_step"


def test_names_that_are_taken():
    step = with_metrics(lambda state, batch: (state, {"loss": 1}), lambda state: {"loss": 2})
    with pytest.raises(ValueError, match="already reports loss"):
        step(None, None)


def test_what_is_frozen_is_passed_on():
    step = with_metrics(lambda state, batch, frozen: (frozen, {}), lambda state: {"more": state})
    assert step(1, 2, frozen=3) == (3, {"more": 3})
