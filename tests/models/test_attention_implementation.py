"""Fused attention in whole models: the same numbers as the blocks, and on a CPU the blocks themselves."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effscale.models import empty_cache, gpt2
from effscale.models.attention import with_padding
from effscale.parallel import DEFAULT_RULES, MeshConfig, per_worker, use_rules
from effscale.training.serialize import differences, to_json
from kernels_pallas.attention import tpu
from kernels_pallas.dispatch import Unsupported

SEQ = 128
GPT2 = gpt2(num_layers=2, d_model=24, num_heads=4, vocab_size=37, max_length=256)


def packed(rows):
    """Ids, segments, and a mask with padding on both sides of the rows."""
    random = np.random.default_rng(3)
    segments = np.repeat([[1, 2, 3]], [50, 30, SEQ - 80], axis=1).repeat(rows, 0)
    mask = np.ones((rows, SEQ), np.int32)
    mask[0, :20] = mask[-1, 100:] = 0
    ids = random.integers(0, 37, (rows, SEQ))
    return tuple(jnp.asarray(x, jnp.int32) for x in (ids, segments, mask))


def loss(model, ids, segments=None, mask=None):
    """Of the real tokens: outputs at padding mean nothing."""
    log_p = jax.nn.log_softmax(model(ids, segment_ids=segments, attention_mask=mask))
    found = jnp.take_along_axis(log_p, ids[..., None], axis=2)[..., 0]
    return -(found if mask is None else jnp.where(mask == 1, found, 0)).sum()


def assert_close(found, expected, rtol):
    for (path, mine), theirs in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        error, size = jnp.abs(mine - theirs).max(), jnp.abs(theirs).max()
        assert error <= rtol * (size + 1), f"{jax.tree_util.keystr(path)}: {error} of {size}"


@pytest.fixture
def interpreted(monkeypatch):
    """Splash runs in Pallas' interpreter."""
    monkeypatch.setattr(tpu, "_kernel", functools.partial(tpu._kernel, interpret=True))


def test_the_numbers_of_the_blocks(tiny, interpreted):
    """Packed rows with padding and ALiBi, under scan and remat: the loss and every gradient."""
    make = functools.partial(tiny, "bloom", remat="dots")
    gradient, batch = jax.jit(jax.value_and_grad(loss)), packed(2)
    found = gradient(make(attention_implementation="splash"), *batch)
    assert_close(found, gradient(make(attention_implementation="blocks"), *batch), 1e-4)


def test_within_per_worker(tiny, interpreted):
    """Grouped queries, where `data` is manual and the types are checked, and rows and heads are divided over other axes."""

    @per_worker
    def step(model, batch):
        value, gradient = jax.value_and_grad(loss)(model, *batch)
        return jax.lax.psum(
            value, "data"
        ), gradient  # which is the sum, as the model is the same on all

    batch = packed(4)
    expected = jax.jit(jax.value_and_grad(loss))(tiny("llama", remat="full"), *batch)
    with jax.set_mesh(MeshConfig(data=2, fsdp=2, tensor=2).build()):
        model = tiny("llama", remat="full", attention_implementation="splash")
        found = jax.jit(step)(model, batch)
    assert_close(found, expected, 1e-4)


def program(config, tiny, *arguments, **options):
    model = tiny(config)
    lowered = jax.jit(jax.value_and_grad(functools.partial(loss, **options))).lower(
        model, *arguments
    )
    return lowered, model


@pytest.mark.exact
def test_a_cpu_computes_the_blocks(tiny, monkeypatch):
    """Bit for bit and in the same memory, where the program might be for a TPU as well."""
    monkeypatch.setattr("jax.default_backend", lambda: "tpu")
    ids = packed(2)[0]
    results, memory = [], []
    for name in (None, "blocks"):
        lowered, model = program(
            dataclasses.replace(GPT2, attention_implementation=name), tiny, ids
        )
        compiled = lowered.compile()
        results.append(jax.tree.leaves(compiled(model, ids)))
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
    for mine, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert memory[0] == memory[1]


@pytest.mark.parametrize(("seq", "where"), [(96, "tpu"), (128, "mesh"), (128, "cpu")])
def test_a_program_that_no_kernel_serves_is_the_blocks_alone(seq, where, tiny, monkeypatch):
    """Of a length that no kernel takes, under a mesh of CPUs, or without a TPU here: the same program to the letter."""
    if where == "tpu":
        monkeypatch.setattr("jax.default_backend", lambda: "tpu")
    ids = packed(2)[0][:, :seq]
    texts = []
    for name in (None, "blocks"):
        config = dataclasses.replace(GPT2, attention_implementation=name)
        mesh = MeshConfig(data=2, fsdp=2, tensor=2).build()
        with jax.set_mesh(mesh) if where == "mesh" else contextlib.nullcontext():
            texts.append(program(config, tiny, ids)[0].as_text())
    assert texts[0] == texts[1]


def test_names_that_cannot_serve(tiny):
    ids = packed(2)[0]
    splash = functools.partial(tiny, attention_implementation="splash")
    shape = lambda model, *arguments, **options: jax.eval_shape(
        lambda *arguments: model(*arguments, **options), *arguments
    )
    with pytest.raises(Unsupported, match="seq=96 is not a multiple of 128; pad the rows to 128"):
        shape(splash("llama"), ids[:, :96])
    dropping = gpt2(num_layers=2, d_model=24, num_heads=4, vocab_size=37, attention_dropout=0.1)
    with pytest.raises(
        Unsupported, match=r"'splash' is not supported here: the kernels have no dropout .* is 0\.1"
    ):
        shape(splash(dropping), ids, key=jax.random.key(0))
    assert shape(splash(dropping), ids).shape == (2, SEQ, 37)
    with (
        use_rules(DEFAULT_RULES | {"seq": "tensor"}),
        pytest.raises(Unsupported, match=r"sharding rules split them over \('tensor',\)"),
    ):
        shape(splash("llama"), ids)


def test_a_cache_is_attended_in_blocks_under_any_name(tiny):
    model = tiny("llama", attention_implementation="splash")
    cache = empty_cache(model.config, batch=2, slots=SEQ)
    extend = lambda model: jax.jit(lambda model, ids, cache: model.encode(ids, cache=cache).hidden)(
        model, packed(2)[0], cache
    )
    np.testing.assert_array_equal(extend(model), extend(tiny("llama")))


def test_padding_is_a_segment_of_its_own():
    valid, segments = jnp.array([[True, False]]), jnp.array([[-1, 7]])
    assert with_padding(segments, valid).tolist() == [[-1, -(2**31)]]
    assert with_padding(None, valid).tolist() == [[0, -(2**31)]]
    assert with_padding(segments, None) is segments
    assert with_padding(None, None) is None


def test_a_config_that_was_saved_before_there_was_the_field():
    saved = to_json(GPT2)
    del saved["attention_implementation"]
    assert differences(saved, to_json(GPT2)) == {}
    other = dataclasses.replace(GPT2, attention_implementation="blocks")
    assert list(differences(saved, to_json(other))) == ["attention_implementation"]
