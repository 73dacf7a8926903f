"""Frozen parameters by optax's recipes: they stay, send nothing, and change nothing for the others."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from effscale.optim import Workers, mean_over_workers, skip_nonfinite
from effscale.parallel import MeshConfig, collectives, per_worker, worker_params
from effscale.training import Loss, create_train_state, make_train_step
from tests.optim.regression import MAKERS, batches, loss_fn, start, step_of

FROZEN = {"kernel": False, "bias": True}
TRAINED = {"kernel": True, "bias": False}


def multi_transform(trained):
    labels = {"kernel": "trained", "bias": "frozen"}
    return optax.multi_transform({"trained": trained, "frozen": optax.set_to_zero()}, labels)


RECIPES = {
    "multi_transform": multi_transform,
    "selective_transform": lambda t: optax.transforms.selective_transform(t, freeze_mask=FROZEN),
    "masked": lambda t: optax.chain(
        optax.masked(t, TRAINED), optax.masked(optax.set_to_zero(), FROZEN)
    ),
    "decayed": lambda t: optax.chain(multi_transform(t), optax.add_decayed_weights(-0.1, FROZEN)),
    "skipped": lambda t: skip_nonfinite(multi_transform(t), "data"),
}


def train(optimizer, params, constants, steps=6):
    """Parameters after some steps, and what each collective of the program sends."""

    def step(params, state, batch):
        loss = lambda params: loss_fn({**params, **constants}, batch)
        updates, state = optimizer.update(
            jax.grad(loss)(worker_params(params, state)), state, params
        )
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(MeshConfig(data=2).build(jax.devices()[:2])):
        state = optimizer.init(params)
        step = jax.jit(per_worker(step)).lower(params, state, next(batches(1))).compile()
        for batch in batches(steps):
            params, state = step(params, state, batch)
    return params, sorted((c.kind, c.sent) for c in collectives(step.as_text()))


@pytest.mark.parametrize("name", MAKERS)
def test_the_others_train_as_if_alone(name):
    """The same numbers, and the same traffic, as of a model in which the frozen ones are constants."""
    optimizer, kernel, bias = MAKERS[name](workers=Workers("data")), *start().values()
    expected, traffic = train(optimizer, {"kernel": kernel}, {"bias": bias})
    found, traffic_with_frozen = train(multi_transform(optimizer), start(), {})
    np.testing.assert_array_equal(found["bias"], bias)
    np.testing.assert_allclose(found["kernel"], expected["kernel"], rtol=1e-6)
    assert (expected["kernel"] != kernel).all()
    assert traffic_with_frozen == traffic
    assert {"all-to-all", "all-gather", "all-reduce"} <= {kind for kind, _ in traffic}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("mesh", [{}, {"data": 2, "tensor": 4}], ids=["data", "tensor"])
def test_recipes(name, mesh):
    for optimizer in (
        MAKERS["onebit_adam"](workers=Workers("data", specs={"kernel": P(None, "tensor")})),
        optax.chain(mean_over_workers("data"), optax.adam(0.1)),
    ):
        frozen = RECIPES[name](optimizer)
        with jax.numpy_dtype_promotion("standard"), jax.set_mesh(MeshConfig(**mesh).build()):
            state = jax.eval_shape(frozen.init, start())
            jax.eval_shape(per_worker(step_of(frozen)), start(), state, next(batches(1)))


def test_in_the_librarys_step():
    frozen = multi_transform(MAKERS["onebit_adam"](workers=Workers("data")))
    loss = lambda params, batch, key: Loss(loss_fn(params, batch), jnp.float32(1))
    with jax.set_mesh(MeshConfig().build()):
        state = create_train_state(start(), frozen, key=jax.random.key(0))
        step = make_train_step(loss, frozen, axis_name="data")
        jax.eval_shape(per_worker(step), state, next(batches(1)))


def test_what_differs_is_still_refused():
    """A rate of zero freezes nothing: zero times NaN is not zero."""
    still = optax.multi_transform(
        {"trained": MAKERS["onebit_adam"](workers=Workers("data")), "frozen": optax.sgd(0.0)},
        {"kernel": "trained", "bias": "frozen"},
    )
    step = per_worker(step_of(still))
    with jax.set_mesh(MeshConfig().build()):
        state = jax.eval_shape(still.init, start())
        with pytest.raises(ValueError, match=r"\['bias'\] differs"):
            jax.eval_shape(step, start(), state, next(batches(1)))
