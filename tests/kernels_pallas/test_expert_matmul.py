"""The products of experts against NumPy, and their kernels, interpreted on the CPU, against the jnp form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from benchmarks.kernels.expert_matmul import SHAPES, Shape, experts, with_tag
from kernels_pallas.dispatch import Unsupported
from kernels_pallas.expert_matmul import api, gather_matmul, reference, sort_rows
from kernels_pallas.expert_matmul.tpu import gather, rows, scatter, vmem
from kernels_pallas.expert_matmul.tpu.steps import make_steps
from tests.kernels_pallas.support import H100, lowered_for, named

SMALL = with_tag("test")
BY_NAME = {shape.name: shape for shape in SHAPES}
list_steps = jax.jit(functools.partial(make_steps, interpret=True), static_argnums=(1, 2))


def slow(o):
    """The hidden rows and the outputs, one row after another."""
    o = jax.tree.map(lambda a: np.asarray(a.astype(jnp.float32), np.float64), o)
    group = np.repeat(np.arange(len(o.sizes)), o.sizes.astype(int))
    hidden = np.zeros((len(o.token_of_row), o.up.shape[2]))
    out = np.zeros((len(o.x), o.down.shape[2]))
    bias = lambda b, g: 0 if b is None else b[g]
    for row, g in enumerate(group):
        token = int(o.token_of_row[row])
        gate = o.x[token] @ o.gate[g] + bias(o.gate_bias, g)
        hidden[row] = gate / (1 + np.exp(-gate)) * (o.x[token] @ o.up[g] + bias(o.up_bias, g))
        out[token] += o.scale[row] * (hidden[row] @ o.down[g] + bias(o.down_bias, g))
    return hidden, out


@jax.jit
def plainly(o):
    """Hidden rows and outputs by the jnp form."""
    inputs = (o.x, o.up, o.sizes, o.token_of_row, o.up_bias, o.gate, o.gate_bias)
    h = reference.gather_matmul(*inputs, jax.nn.silu)
    inputs = (h, o.down, o.sizes, o.token_of_row, o.scale, o.down_bias)
    return h, reference.matmul_scatter(*inputs, len(o.x))


def by_kernels(o, interpret=True):
    """The same by the kernels. It is waited for: an interpreter calls back into Python."""

    @jax.jit
    def run(o):
        inputs = (o.x, o.up, o.sizes, o.token_of_row, o.up_bias, o.gate, o.gate_bias)
        h = gather.gather_matmul(*inputs, jax.nn.silu, interpret=interpret)
        inputs = (h, o.down, o.sizes, o.token_of_row, o.scale, o.down_bias)
        return h, scatter.matmul_scatter(*inputs, len(o.x), interpret=interpret)

    return jax.block_until_ready(run(jax.block_until_ready(o)))


def check(found, expected, dtype):
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        scale = max(np.abs(b).max(), 1e-3)
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=tolerance, atol=tolerance * scale)


@named(SMALL)
def test_against_numpy(shape, getkey):
    o = jax.jit(shape.operands)(getkey())
    expected = slow(o)
    check(plainly(o), expected, shape.dtype)
    check(by_kernels(o), expected, shape.dtype)


def test_with_the_memories_of_a_tpu(getkey):
    """This interpreter starts memory as NaN and refuses reads out of bounds."""
    o = jax.jit(BY_NAME["odd"].operands)(getkey())
    check(by_kernels(o, pltpu.InterpretParams()), slow(o), "float32")


def test_with_small_tiles_and_without_a_gate(getkey, monkeypatch):
    """Several tiles of rows that groups share, and several of outputs, for which each is gathered once."""
    monkeypatch.setattr(vmem, "LARGEST_TILE", 16)
    monkeypatch.setattr(vmem, "_BUDGET", 2**19)
    shape = BY_NAME["tiles"]
    assert vmem.gather_outputs(100, 64, 400, 2, jnp.dtype("bfloat16")) == 128
    o = jax.jit(shape.operands)(getkey())
    check(by_kernels(o), slow(o), shape.dtype)
    one = o.x, o.up, o.sizes, o.token_of_row, None, None, None, None
    found = jax.jit(functools.partial(gather.gather_matmul, interpret=True))(*one)
    expected = jax.jit(reference.gather_matmul)(*one)
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), atol=0.05)


def test_a_token_that_is_not_finite_harms_no_other(getkey):
    o = jax.jit(BY_NAME["odd"].operands)(getkey())
    bad = o._replace(x=o.x.at[1].set(jnp.inf))
    others = np.arange(len(o.x)) != 1
    found, expected = by_kernels(bad)[1], by_kernels(o)[1]
    assert not np.isfinite(found[1]).any()
    np.testing.assert_array_equal(found[others], expected[others])


@pytest.mark.parametrize("k", [1, 3])
def test_sorted_rows(k):
    """Each token's choices, some of them of no expert, against a stable sort."""
    rng = np.random.default_rng(0)
    experts = np.stack([rng.permutation(7)[:k] for _ in range(20)])
    experts[4:9] = 6  # padding: there are six experts
    flat = experts.reshape(-1)
    order = np.argsort(flat, kind="stable")
    sizes = np.bincount(flat, minlength=7)[:6]
    positions = np.zeros(flat.size, int)
    positions[order] = (
        np.arange(flat.size) - (np.cumsum(np.append(sizes, 0)) - np.append(sizes, 0))[flat[order]]
    )
    weights = rng.uniform(size=experts.shape)
    integer = lambda a: jnp.asarray(a, jnp.int32)
    operands = (
        integer(experts),
        integer(positions.reshape(experts.shape)),
        jnp.asarray(weights, jnp.float32),
        integer(sizes),
    )
    filled = sizes.sum()
    for function in (reference.sort_rows, functools.partial(rows.sort_rows, interpret=True)):
        found = jax.jit(function)(*operands)
        np.testing.assert_array_equal(found.token[:filled], order[:filled] // k)
        np.testing.assert_allclose(
            found.weight[:filled], weights.reshape(-1)[order[:filled]], rtol=1e-6
        )
        assert not found.token[filled:].any()
        assert not found.weight[filled:].any()
    assert sort_rows(*operands).token.tolist() == found.token.tolist()


@given(cuts=st.lists(st.integers(0, 24), min_size=5, max_size=5), tile=st.sampled_from([4, 16]))
def test_steps_cover_each_row_once(cuts, tile):
    sizes = np.diff([0, *sorted(cuts)])
    steps = list_steps(jnp.asarray(sizes), 24, tile)
    group, number, first, last = (np.asarray(a) for a in steps[:4])
    assert [r for a, b in zip(first, last, strict=True) for r in range(a, b)] == list(range(24))
    mine = np.repeat(np.arange(5), sizes)
    assert steps.filled.tolist() == [len(mine)]
    for g, t, a, b in zip(group, number, first, last, strict=True):
        assert all(r // tile == t for r in range(a, b))
        own = mine[a:b]
        assert (own == g).all()
        if not len(own):  # no weight is read for nothing
            assert g == (mine[-1] if len(mine) else 0)


def test_sizes_that_say_too_much_stay_within_the_rows():
    steps = list_steps(jnp.array([20, 20, -3, 20, 20]), 24, 4)
    assert steps.last.max() == 24
    assert steps.filled.tolist() == [24]


def test_gradients(getkey):
    """Of the kernels as of the jnp form, which has finite differences as its own oracle."""
    shape = Shape(name="few", tokens=3, experts=3, k=2, d_model=4, d_ff=6, bias=True, padding=1)
    o = jax.jit(shape.operands)(getkey())
    g = jax.random.normal(getkey(), o.x.shape)
    integers = {"sizes": o.sizes, "token_of_row": o.token_of_row}
    o = o._replace(scale=jnp.nan_to_num(o.scale))
    floats = {name: a for name, a in o._asdict().items() if name not in integers}
    where = type(o)
    loss = lambda floats, by: (g * experts(where(**floats, **integers), by)).sum()
    by_name = jax.jit(jax.grad(loss), static_argnums=1)
    found = by_name(floats, "reference")
    with pltpu.force_tpu_interpret_mode():
        kernels = jax.block_until_ready(by_name(floats, "tpu"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), kernels, found)
    direction = jax.tree.map(lambda a: jax.random.normal(getkey(), a.shape), floats)

    @jax.jit
    def at(step):
        return loss(jax.tree.map(lambda a, d: a + step * d, floats, direction), "reference")

    along = sum(jax.tree.leaves(jax.tree.map(lambda a, d: (a * d).sum(), found, direction)))
    np.testing.assert_allclose(along, (at(1e-2) - at(-1e-2)) / 2e-2, rtol=1e-2)


def test_kernels_serve_within_a_shard_map(getkey):
    shape = BY_NAME["one token"]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    devices = [jax.jit(shape.operands)(key) for key in jax.random.split(getkey(), 2)]
    stacked = jax.block_until_ready(jax.tree.map(lambda *a: jnp.stack(a), *devices))

    def one(o):
        return experts(jax.tree.map(lambda a: a[0], o), "tpu")[None]

    run = jax.shard_map(one, in_specs=P("data"), out_specs=P("data"))
    with jax.set_mesh(mesh), pltpu.force_tpu_interpret_mode():
        found = jax.block_until_ready(jax.jit(run)(stacked))
        with pytest.raises(Unsupported, match=r"'data',.* are partitioned by the compiler"):
            jax.eval_shape(functools.partial(experts, implementation="tpu"), devices[0])
    for a, o in zip(found, devices, strict=True):
        np.testing.assert_allclose(a, slow(o)[1], rtol=1e-5, atol=1e-4)


def test_each_platform_gets_its_own():
    operands = (BY_NAME["one token"].abstract(),)
    run = lambda o: experts(o, None)
    assert lowered_for("tpu", run, operands).count("@tpu_custom_call") >= 3
    for platform, kind in (("cpu", None), ("cuda", H100)):
        assert "custom_call" not in lowered_for(platform, run, operands, kind)
    many = Shape(name="many", tokens=4096, experts=8, k=2, d_model=4096, d_ff=128)
    assert "ragged_dot" in lowered_for("tpu", run, (many.abstract(),))
    with pytest.raises(Unsupported, match="leave no room for a tile of the weight"):
        jax.eval_shape(functools.partial(experts, implementation="tpu"), many.abstract())


def test_bad_input(getkey):
    o = BY_NAME["odd"].operands(getkey())
    gather = (o.x, o.up, o.sizes, o.token_of_row)
    with pytest.raises(ValueError, match=r"source must have one dimension, got the shape \(3, 7\)"):
        api.check_gather(*gather[:3], o.token_of_row.reshape(3, 7), None, None, None)
    with pytest.raises(ValueError, match="gate_bias needs gate"):
        gather_matmul(*gather, gate_bias=o.gate_bias)
    with pytest.raises(
        ValueError, match=r"gate must have the shape of weight, .*, got \(5, 72, 40\)"
    ):
        api.check_gather(*gather, None, o.down, None)
    with pytest.raises(
        ValueError, match=r"scale must have one entry for each row of h .*, got the shape \(20,\)"
    ):
        api.check_scatter(jnp.zeros((21, 72)), o.down, o.sizes, o.token_of_row, o.scale[:20], None)
    half = Shape(name="half", tokens=2, experts=2, k=1, d_model=8, d_ff=8, dtype="float16")
    with pytest.raises(Unsupported, match="operands are float16"):
        jax.eval_shape(functools.partial(experts, implementation="tpu"), half.abstract())
