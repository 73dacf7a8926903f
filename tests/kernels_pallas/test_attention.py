"""The reference against loops in float64, splash in Pallas' interpreter against the reference, and who serves what."""

import dataclasses
import functools
import importlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import kernels_pallas
from benchmarks.kernels.attention import Operands, Shape, with_tag
from kernels_pallas import aot
from kernels_pallas.attention import Alibi, api, gpu, tpu
from kernels_pallas.attention.alibi import MAX_POSITION, with_features
from kernels_pallas.dispatch import Unsupported
from tests.kernels_pallas.support import named

TINY = Shape(name="tiny", batch=2, heads=4, kv_heads=2, seq=128, head_dim=8, dtype="float32")


def call(shape, operands, **options):
    query, keys, values, segments, positions = operands
    return kernels_pallas.attention(
        query,
        keys,
        values,
        causal=shape.causal,
        segments=segments,
        alibi=shape.bias(positions),
        **options,
    )


def value_and_gradients(shape, operands, **options):
    """Of a sum that weighs every number of the output differently; the output, and three gradients."""
    weights = jax.random.normal(jax.random.key(1), operands.query.shape)

    def total(query, keys, values):
        out = call(shape, operands._replace(query=query, keys=keys, values=values), **options)
        return (out.astype(jnp.float32) * weights).sum(), out

    found = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*operands[:3])
    return [np.asarray(x, np.float64) for x in (found[1], *found[0])]


@pytest.fixture
def interpreted(monkeypatch):
    """Splash runs in Pallas' interpreter."""
    monkeypatch.setattr(tpu, "_kernel", functools.partial(tpu._kernel, interpret=True))


def test_the_reference_is_the_formula(getkey):
    shape = dataclasses.replace(TINY, seq=20, alibi=True)
    operands = shape.operands(getkey())
    query, keys, values = (np.asarray(x, np.float64) for x in operands[:3])
    segments, positions = np.asarray(operands.segments), np.asarray(operands.positions)
    slopes = shape.bias(positions).slopes
    expected = np.zeros_like(query)
    for row, head, i in np.ndindex(query.shape[:3]):
        seen = [j for j in range(i + 1) if segments[row, j] == segments[row, i]]
        key_head = head // 2
        scores = [
            query[row, head, i] @ keys[row, key_head, j] + slopes[head] * positions[row, j]
            for j in seen
        ]
        weights = np.exp(scores - np.max(scores))
        expected[row, head, i] = weights @ values[row, key_head, seen] / weights.sum()
    found = call(shape, operands, implementation="reference")
    np.testing.assert_allclose(found, expected, atol=2e-6)


@named(with_tag("test"))
def test_splash_in_the_interpreter(shape, interpreted, getkey):
    """Values and gradients; in bfloat16 it is as near to float32 as the reference in bfloat16 is."""
    operands = shape.operands(getkey())
    found = value_and_gradients(shape, operands, implementation="splash")
    exact = operands._replace(
        **{name: getattr(operands, name).astype(jnp.float32) for name in operands._fields[:3]}
    )
    expected = value_and_gradients(shape, exact, implementation="reference")
    if shape.dtype == "float32":
        for mine, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-4)
    else:
        rounded = value_and_gradients(shape, operands, implementation="reference")
        for mine, theirs, plain in zip(found, expected, rounded, strict=True):
            assert np.abs(mine - theirs).max() <= 1.5 * np.abs(plain - theirs).max()


@pytest.mark.parametrize("num_heads", [16, 112])
def test_alibi_in_bfloat16_features_is_that_of_float32(num_heads):
    """Up to the last position; a bias that is rounded to bfloat16 would be off by 128 there."""
    positions = np.r_[np.arange(0, MAX_POSITION, 997), MAX_POSITION - 1][None]
    slopes = (2.0 ** (-8 / num_heads * np.arange(1, num_heads + 1))).astype(np.float32)
    zeros = jnp.zeros((1, num_heads, positions.shape[1], 8), jnp.bfloat16)
    query, keys = with_features(zeros, zeros, Alibi(slopes, jnp.asarray(positions)))
    query, keys = (np.asarray(x.astype(jnp.float32), np.float64) for x in (query, keys))
    found = np.einsum("hd,hkd->hk", query[0, :, 0], keys[0])
    np.testing.assert_allclose(found, slopes.astype(np.float64)[:, None] * positions, rtol=2e-7)


MESHES = {
    "rows and heads divided": ({}, False),
    "rows that no axis divides": ({"batch": 1}, False),
    "heads that no axis divides": ({"heads": 3, "kv_heads": 3}, False),
    "one key head on two devices": ({"kv_heads": 1}, False),
    "inside a shard_map over data": ({"batch": 4}, True),
}


@pytest.mark.parametrize("name", MESHES)
def test_on_a_mesh(name, interpreted, getkey):
    """Eight devices as one, whatever divides; also where a technique has taken `data` into its own hands."""
    changes, inside = MESHES[name]
    shape = dataclasses.replace(TINY, **changes)
    operands = shape.operands(getkey())
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)

    def gradients(query, keys, values, segments, implementation="splash"):
        def total(query, keys, values):
            out = call(
                shape,
                Operands(query, keys, values, segments, None),
                row_axes=("data", "fsdp"),
                head_axes=("tensor",),
                implementation=implementation,
            )
            return jnp.square(out).sum()

        return jax.grad(total, (0, 1, 2))(query, keys, values)

    step = gradients
    if inside:
        over_data = {"in_specs": (P("data"),) * 4, "out_specs": P("data")}
        step = jax.shard_map(gradients, **over_data, axis_names={"data"})
    with jax.set_mesh(mesh):
        found = jax.jit(step)(*operands[:4])
    plain = functools.partial(gradients, implementation="reference")
    for mine, theirs in zip(found, jax.jit(plain)(*operands[:4]), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)


def lowered(platform, shape, **options):
    """The StableHLO of value and gradients for a platform that is not here."""

    def total(operands):
        return call(shape, operands, **options).astype(jnp.float32).sum()

    traced = jax.jit(jax.value_and_grad(total, allow_int=True)).trace(shape.abstract())
    return traced.lower(lowering_platforms=(platform,)).as_text()


def kernels(text):
    return re.findall(r"@(tpu_custom_call|__cudnn\$fmha\w+)", text)


def test_the_private_parts_of_jax_are_where_they_were():
    """Where this fails, a new JAX has moved them: see what `_missing` says, and adapt tpu.py or gpu.py."""
    assert tpu._missing() is None, tpu._missing()
    assert gpu._missing() is None, gpu._missing()
    shape = dataclasses.replace(TINY, dtype="bfloat16", packed=False)
    assert kernels(lowered("tpu", shape, implementation="splash")) == ["tpu_custom_call"] * 3
    found = set(kernels(lowered("cuda", shape, implementation="cudnn")))
    assert found == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}


def test_none_takes_splash_in_programs_for_tpus_and_nothing_else(monkeypatch):
    shape = dataclasses.replace(TINY, dtype="bfloat16", packed=False)
    # Where this process has no TPU, and no mesh says that the program is for some, there is no kernel to be seen.
    traced = jax.jit(functools.partial(call, shape)).trace(shape.abstract())
    assert "pallas_call" not in str(traced.jaxpr)
    monkeypatch.setattr("jax.default_backend", lambda: "tpu")
    assert kernels(lowered("tpu", shape))
    assert not kernels(lowered("cpu", shape))
    assert not kernels(lowered("cuda", shape))
    # A mesh in use says what the program is for, and then the other platforms' branches are not even traced.
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))):
        traced = jax.jit(functools.partial(call, shape)).trace(shape.abstract())
    assert "pallas_call" not in str(traced.jaxpr)


REFUSED = {
    "seq": ("splash", {"seq": 200}, "seq=200 is not a multiple of 128; pad the rows to 256"),
    "float16": ("splash", {"dtype": "float16"}, "the query is float16"),
    "wide": ("splash", {"head_dim": 252, "alibi": True}, "heads are 258 features wide"),
    "long": ("splash", {"seq": 2 * MAX_POSITION, "alibi": True}, "ALiBi is exact up to 65536"),
    "empty": ("splash", {"batch": 0}, "is empty"),
    "float32": ("cudnn", {"packed": False}, "the query is float32"),
    "segments": ("cudnn", {"dtype": "bfloat16"}, "padding or several segments"),
    "wide on GPUs": ("cudnn", {"head_dim": 264, "dtype": "float16", "packed": False}, "heads are 264"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_cannot_serve_says_why(name):
    implementation, changes, reason = REFUSED[name]
    shape = dataclasses.replace(TINY, **changes)
    run = lambda which: jax.eval_shape(
        lambda operands: call(shape, operands, implementation=which), shape.abstract()
    )
    message = rf"attention: implementation='{implementation}' is not supported here: .*{reason}"
    with pytest.raises(Unsupported, match=message):
        run(implementation)
    assert run(None).shape == shape.abstract().query.shape


def test_meshes_that_a_kernel_cannot_serve():
    of_two = functools.partial(jax.make_mesh, (2,), ("data",), devices=jax.devices()[:2])
    shape = dataclasses.replace(TINY, batch=4)
    run = lambda operands: call(shape, operands, implementation="splash")
    operands = shape.abstract()
    with (
        jax.set_mesh(of_two(axis_types=(AxisType.Explicit,))),
        pytest.raises(Unsupported, match=r"\{'data': 2\} has axes of Explicit type"),
    ):
        jax.eval_shape(run, operands)
    mesh = of_two(axis_types=(AxisType.Auto,))
    checked = jax.shard_map(run, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    with pytest.raises(Unsupported, match=r"checked jax\.shard_map over all mesh axes"):
        jax.eval_shape(checked, operands)
    unchecked = jax.shard_map(
        run, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    assert jax.eval_shape(unchecked, operands).shape == operands.query.shape


@pytest.mark.parametrize(
    ("implementation", "module", "name"),
    [
        ("splash", "jax.experimental.pallas.ops.tpu.splash_attention", "splash_attention_kernel"),
        ("cudnn", "jax._src.cudnn", "fused_attention_stablehlo"),
    ],
)
def test_a_jax_that_has_moved_them(implementation, module, name, monkeypatch):
    """Without the module, and with a module that lacks the function: None falls back, and the name is refused."""
    shape = dataclasses.replace(TINY, dtype="bfloat16", packed=False)
    owner = tpu if implementation == "splash" else gpu
    function = "_splash_attention_bwd" if owner is tpu else "_dot_product_attention_bwd_p_wrapper"

    def refused():
        owner._missing.cache_clear()
        with pytest.raises(Unsupported, match=rf"jax {jax.__version__} has moved"):
            lowered("tpu", shape, implementation=implementation)
        assert not kernels(lowered("tpu" if owner is tpu else "cuda", shape))

    with monkeypatch.context() as patch:
        patch.delattr(importlib.import_module(f"{module}.{name}"), function)
        refused()
    with monkeypatch.context() as patch:
        patch.delattr(importlib.import_module(module), name)
        patch.setitem(sys.modules, f"{module}.{name}", None)
        refused()
    owner._missing.cache_clear()


MISFITS = {
    "length": ({"keys": (2, 2, 64, 8), "values": (2, 2, 64, 8)}, r"differ only in the heads, got .*\(2, 2, 64, 8\)"),
    "values": ({"values": (2, 4, 128, 8)}, r"differ only in the heads, got .* and \(2, 4, 128, 8\)"),
    "groups": ({"keys": (2, 3, 128, 8), "values": (2, 3, 128, 8)}, "the number of key heads must divide the 4 query heads, got 3"),
    "segments": ({"segments": (1, 128)}, r"segments must have the shape \(2, 128\), got \(1, 128\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_operands_that_do_not_fit(name):
    shapes, message = MISFITS[name]
    changed = {field: jax.ShapeDtypeStruct(shape, "float32") for field, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        api.check_operands(*TINY.abstract()._replace(**changed)[:4], None)


def test_slopes_that_do_not_fit():
    alibi = Alibi(np.ones(2, np.float32), jnp.arange(128)[None])
    with pytest.raises(
        ValueError, match=r"slopes must have one entry for each of 4 heads, got \(2,\)"
    ):
        api.check_operands(*TINY.abstract()[:4], alibi)


def test_operands_of_several_types_are_for_the_fallback():
    operands = TINY.abstract()
    operands = operands._replace(keys=jax.ShapeDtypeStruct(operands.keys.shape, "bfloat16"))
    assert "float32, bfloat16, float32" in api.why_not("splash", *operands[:4])


class Compiled:
    """What a compiler returns, with a text of its own."""

    def __init__(self, text):
        self.as_text = lambda: text

    def memory_analysis(self):
        return jax.jit(jnp.square).lower(1.0).compile().memory_analysis()

    def cost_analysis(self):
        return None

    def compile(self):
        return self


def test_cudnn_counts_as_a_kernel_and_scores_as_a_failure():
    calls = (
        'custom_call_target="__cudnn$fmhaSoftmax" custom_call_target="__cudnn$fmhaSoftmaxBackward"'
    )
    scores = dataclasses.replace(TINY, seq=2048).scores()
    lower = lambda text: lambda devices: Compiled(text)
    compiled = lambda text: aot.compile_program(
        aot.Program(name="attention", lower=lower(text), without=scores), "h100", []
    )
    assert compiled(f"bf16[4,2048,112,128] bf16[2048,1024] {calls}").kernels == 2
    for array in ("f32[4,56,512,2048]", "f32[224,2048,1536]"):
        assert compiled(array).error == f"the compiled program contains {array}"
