"""What optax asks of a contributed optimizer: its ten properties, on one worker."""

import inspect
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from effscale import optim

DECAYING = optax.exponential_decay(1.0, 1000, 0.6)
OPTIMIZERS = {
    "onebit_adam": {"learning_rate": 3e-3, "freeze_step": 5000},
    "zero_one_adam": {
        "learning_rate": 3e-3,
        "var_freeze_step": 5000,
        "local_step_scaler": 2000,
        "local_step_clipper": 4,
    },
    "onebit_lamb": {"learning_rate": 1e-3, "freeze_step": 5000},
    "lamb": {"learning_rate": 1e-3},
}


@pytest.fixture(autouse=True)
def promotion():
    """Optax's own wrappers mix integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(params=OPTIMIZERS)
def name(request):
    return request.param


def build(name, **overrides):
    return getattr(optim, name)(**(OPTIMIZERS[name] | overrides))


def parabola():
    goal = jnp.array([1.0, -1.0, 1.0])
    return jnp.array([-1.0, 10.0, 1.0]), goal, lambda x: jnp.sum((x - goal) ** 2)


def rosenbrock():
    goal = jnp.array([1.0, 1.0])
    return jnp.zeros(2), goal, lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def matrix():
    goal = jnp.array([[3.0, -2.0], [1.0, 4.0]])
    return jnp.zeros((2, 2)), goal, lambda x: jnp.sum((x - goal) ** 2)


def mixed():
    goal = (jnp.array([1.0, -1.0, 2.0]), jnp.array([[1.0, 0.0], [-1.0, 1.0]]))
    start = jax.tree.map(jnp.zeros_like, goal)
    return start, goal, lambda x: sum(jnp.sum((a - b) ** 2) for a, b in zip(x, goal, strict=True))


def step_of(optimizer, function, **extra):
    def step(params, state):
        updates, state = optimizer.update(jax.grad(function)(params), state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


class Compilations(logging.Handler):
    def __init__(self):
        super().__init__()
        self.found = []

    def emit(self, record):
        if "Finished XLA compilation" in record.getMessage():
            self.found.append(record.getMessage())


def test_extra_arguments_and_one_compilation(name):
    start, _, function = parabola()
    optimizer = build(name)
    step = jax.jit(step_of(optimizer, function, an_argument_that_nobody_knows=1))
    params, state = step(start, optimizer.init(start))
    handler = Compilations()
    logger = logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            step(params, state)
    finally:
        logger.removeHandler(handler)
    assert not handler.found


@pytest.mark.parametrize("target", [parabola, rosenbrock, matrix, mixed])
def test_converges(name, target):
    start, goal, function = target()
    rate = OPTIMIZERS[name]["learning_rate"]
    optimizer = build(
        name, learning_rate=lambda count: rate * DECAYING(jnp.maximum(count - 10_000, 0))
    )
    step = step_of(optimizer, function)
    run = jax.jit(
        lambda carry: jax.lax.scan(lambda c, _: (step(*c), None), carry, length=30_000)[0]
    )
    params, _ = run((start, optimizer.init(start)))
    for found, expected in zip(jax.tree.leaves(params), jax.tree.leaves(goal), strict=True):
        np.testing.assert_allclose(found, expected, rtol=3e-2, atol=3e-2)


def test_map_params(name):
    start, _, _ = mixed()
    optimizer = build(name)
    state = optimizer.init(start)
    doubled = optax.tree.map_params(optimizer, lambda x: x + 1, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    changed = [
        bool((a != b).any())
        for a, b in zip(jax.tree.leaves(doubled), jax.tree.leaves(state), strict=True)
    ]
    assert any(changed)
    # Counters are no parameters; LAMB alone has none.
    assert all(changed) == (name == "lamb")


def test_injected_hyperparams(name):
    start, _, function = mixed()
    plain = build(name)
    factory = getattr(optim, name)
    injected = optax.inject_hyperparams(factory)(**OPTIMIZERS[name])
    a, b = (start, plain.init(start)), (start, injected.init(start))
    for _ in range(3):
        a, b = jax.jit(step_of(plain, function))(*a), jax.jit(step_of(injected, function))(*b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), a[0], b[0])
    assert "learning_rate" in b[1].hyperparams


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_types_are_kept(name, dtype):
    start, _, function = mixed()
    start = jax.tree.map(lambda x: x.astype(dtype), start)
    optimizer = build(name, weight_decay=0.1)
    gradients = jax.tree.map(lambda x: x.astype(dtype), jax.grad(function)(start))
    updates, _ = optimizer.update(gradients, optimizer.init(start), start)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}


def test_multi_steps(name):
    """Two steps on half a gradient each are one on all of it."""
    start, _, _ = mixed()
    gradients = jax.tree.map(lambda x: jnp.arange(1.0, x.size + 1).reshape(x.shape), start)
    optimizer = build(name)
    several = optax.MultiSteps(optimizer, 2)
    expected, _ = optimizer.update(gradients, optimizer.init(start), start)
    state = several.init(start)
    first, state = several.update(jax.tree.map(lambda g: 0.5 * g, gradients), state, start)
    second, state = several.update(jax.tree.map(lambda g: 1.5 * g, gradients), state, start)
    assert not any(x.any() for x in jax.tree.leaves(first))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), second, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_state_is_stable_through_cond(name, dtype):
    params = jnp.array([1.0, 2.0], dtype)
    optimizer = build(name)
    state = optimizer.init(params)
    new = jax.jit(
        lambda s: jax.lax.cond(
            True, lambda s: optimizer.update(params, s, params)[1], lambda s: s, s
        )
    )(state)
    assert jax.tree.map(jnp.dtype, jax.tree.map(lambda x: x.dtype, new)) == jax.tree.map(
        jnp.dtype, jax.tree.map(lambda x: x.dtype, state)
    )


def test_a_schedule_is_taken_where_it_is_announced(name):
    """And only there: every argument whose annotation is ScalarOrSchedule."""
    signature = inspect.signature(getattr(optim, name))
    takes = [
        p.name for p in signature.parameters.values() if p.annotation == optax.ScalarOrSchedule
    ]
    assert takes == ["learning_rate"]
    start, _, function = parabola()
    rate = OPTIMIZERS[name]["learning_rate"]
    constant, scheduled = build(name), build(name, learning_rate=optax.constant_schedule(rate))
    a = step_of(constant, function)(start, constant.init(start))[0]
    b = step_of(scheduled, function)(start, scheduled.init(start))[0]
    np.testing.assert_array_equal(a, b)


def test_shardings_are_stable(name):
    """On an explicit mesh, types (and with them shardings) of updates and states do not change."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        params = jax.device_put(jnp.arange(1.0, 17.0), NamedSharding(mesh, P("x")))
        optimizer = build(name)
        state = optimizer.init(params)
        updates, new = jax.jit(optimizer.update)(params, state, params)
        assert jax.typeof(updates) == jax.typeof(params)
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)


def test_a_fresh_state_can_be_donated(name):
    """Which an array that is there twice cannot."""
    workers = [{}] if name == "lamb" else [{}, {"axis_name": "data", "num_workers": 2}]
    for options in workers:
        state = build(name, **options).init(parabola()[0])
        jax.block_until_ready(jax.jit(lambda state: state, donate_argnums=0)(state))
