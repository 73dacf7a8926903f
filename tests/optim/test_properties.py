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
from effscale.optim import Workers
from effscale.parallel import MeshConfig, PerWorker, shardings

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


@pytest.fixture(params=["float16", "bfloat16", "float32", "float32 in x64", "float64 in x64"])
def dtype(request):
    """A type of parameters, also where JAX computes Python's numbers in float64."""
    with jax.enable_x64(request.param.endswith("x64")):
        yield request.param.split()[0]


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


@pytest.mark.parametrize("workers", [None, Workers("data")])
def test_map_params_lays_a_state_out(name, workers):
    """It maps over arrays shaped like the parameters and over no others, and `shardings` knows where those lie."""
    params = {"w": jnp.ones((8, 6)), "b": jnp.ones(6)}
    specs = {"w": P("fsdp", "tensor"), "b": P("tensor")}
    options = {} if name == "lamb" else {"workers": workers}
    shapes = []

    def place(x, spec):
        shapes.append((x.shape, spec))
        return NamedSharding(mesh, spec)

    mesh = MeshConfig(data=2, fsdp=2, tensor=2).build()
    optimizer = build(name, **options)
    with jax.set_mesh(mesh):
        state = optimizer.init(params)
    places = optax.tree.map_params(
        optimizer, place, state, specs, transform_non_params=lambda part: shardings(part, mesh)
    )
    assert set(shapes) <= {((8, 6), specs["w"]), ((6,), specs["b"])}
    placed = jax.device_put(state, places)
    assert optax.tree.get(placed, "nu")["w"].sharding.spec == specs["w"]
    is_own = lambda node: isinstance(node, PerWorker)
    own = jax.tree.leaves(list(filter(is_own, jax.tree.leaves(placed, is_leaf=is_own))))
    assert bool(own) == bool(options.get("workers"))
    assert all(x.sharding.spec[0] == "data" for x in own)


def test_a_part_without_parameters(name):
    """As `optax.partition` makes where no parameter has a label: nothing happens, also with workers."""
    axis = {} if name == "lamb" else {"workers": Workers("data", num_workers=2)}
    optimizer = optax.partition({"a": build(name, **axis), "b": optax.sgd(0.1)}, {"w": "b"})
    params = {"w": jnp.ones(2)}
    updates, _ = jax.vmap(
        lambda g, s: optimizer.update(g, s, params), axis_name="data", in_axes=(0, None)
    )({"w": jnp.ones((2, 2))}, optimizer.init(params))
    np.testing.assert_allclose(updates["w"], -0.1)


def test_what_scales_has_no_rate_and_no_decay():
    """In optax a ``scale_by_`` is a link of a chain, followed by weight decay and learning rate."""
    for name in optim.__all__:
        if name.startswith("scale_by_"):
            assert not {"learning_rate", "weight_decay"} & set(
                inspect.signature(getattr(optim, name)).parameters
            )


def test_states_are_public_named_tuples(name):
    """So that a checkpoint can be looked at by `optax.tree.get` and a state changed by ``_replace``."""
    state = build(name).init(jnp.ones(2))
    nodes, found = [state], set()
    while nodes:
        node = nodes.pop()
        if type(node).__module__.startswith("effscale"):
            found.add(type(node).__name__)
            assert isinstance(node, tuple)
            assert node._fields
        nodes += node if isinstance(node, tuple) else []
    assert found
    assert not any(state.startswith("_") for state in found)
    assert optax.tree.get(state, "nu").shape == (2,)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_parameters_are_asked_for_where_they_count(name, weight_decay):
    optimizer = build(name, weight_decay=weight_decay)
    params = jnp.array([1.0, 2.0])
    state = optimizer.init(params)
    if weight_decay or "lamb" in name:
        with pytest.raises(ValueError, match="param"):
            optimizer.update(params, state)
        return
    jax.tree.map(
        np.testing.assert_array_equal, optimizer.update(params, state), optimizer.update(params, state, params)
    )  # fmt: skip
    stages = {"freeze_step": 1} if name == "onebit_adam" else {"var_freeze_step": 1}
    optimizer = build(name, **stages, exp_avg_mask=lambda p: jnp.ones_like(p))
    with pytest.raises(ValueError, match="exp_avg_mask is a function of the parameters"):
        optimizer.update(params, state)


def test_a_momentum_in_half_precision(name):
    """It is kept in bfloat16, and what happens is what happens in float32, up to its rounding."""
    stages = {
        "onebit_adam": {"freeze_step": 4},
        "onebit_lamb": {"freeze_step": 4},
        "zero_one_adam": {"var_freeze_step": 4, "local_step_scaler": 2, "local_step_clipper": 2},
        "lamb": {},
    }[name]
    start, _, function = mixed()
    start = jax.tree.map(lambda x: x + 1.0, start)
    ends = []
    for dtype in (None, "bfloat16"):
        optimizer = build(name, learning_rate=0.01, mu_dtype=dtype, **stages)
        params, state = start, optimizer.init(start)
        step = jax.jit(step_of(optimizer, function))
        for _ in range(12):
            params, state = step(params, state)
        types = {x.dtype for x in jax.tree.leaves(optax.tree.get(state, "mu"))}
        assert types == {jnp.dtype(dtype or "float32")}
        ends.append(params)
    for a, b, s in zip(*map(jax.tree.leaves, (*ends, start)), strict=True):
        assert (a != b).any()
        np.testing.assert_allclose(a - s, b - s, rtol=0.05, atol=1e-4)
    with pytest.raises(ValueError, match=r"mu_dtype must be .*got 'int8'"):
        build(name, mu_dtype="int8")


@pytest.mark.parametrize("dtype", ["float32", "float64 in x64"], indirect=True)
def test_injected_hyperparams(name, dtype):
    """Which are arrays of the parameters' type."""
    start, _, function = mixed()
    plain = build(name)
    factory = getattr(optim, name)
    injected = optax.inject_hyperparams(factory)(**OPTIMIZERS[name])
    a, b = (start, plain.init(start)), (start, injected.init(start))
    for _ in range(3):
        a, b = jax.jit(step_of(plain, function))(*a), jax.jit(step_of(injected, function))(*b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), a[0], b[0])
    assert "learning_rate" in b[1].hyperparams


def test_types_are_kept(name, dtype):
    """In the warm-up and after it, of updates and of the state, which a ``lax.scan`` carries."""
    stages = {k: 2 for k in OPTIMIZERS[name] if k.endswith("freeze_step")}
    optimizer = build(name, weight_decay=0.1, **stages)
    params = jax.tree.map(lambda x: x.astype(dtype), mixed()[0])
    gradients = jax.tree.map(jnp.ones_like, params)

    def step(state, _):
        updates, state = optimizer.update(gradients, state, params)
        return state, updates

    state, updates = jax.lax.scan(step, optimizer.init(params), length=4)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((state, updates)))


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
    workers = [{}] if name == "lamb" else [{}, {"workers": Workers("data", num_workers=2)}]
    for options in workers:
        state = build(name, **options).init(parabola()[0])
        jax.block_until_ready(jax.jit(lambda state: state, donate_argnums=0)(state))
