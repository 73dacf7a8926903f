"""The layout of our own: all that a packed weight can be comes back as it was, and damage is named."""

import dataclasses
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effscale.interop import FolderError, load_packed, load_pretrained, save_packed
from effscale.interop.files.safetensors import SafetensorsFile
from effscale.interop.files.writer import write_tensors
from effscale.interop.packed.own_layout import KEY
from effscale.models import Transformer, bloom, gpt2, map_weights
from effscale.quant import Format, Recipe, Rule, quantize_model

SIZES = {"num_layers": 2, "d_model": 32, "num_heads": 2, "vocab_size": 48}
TOKENS = Format(granularity="token")
TENSOR = Format(granularity="tensor", symmetric=False)


def quantized(config, *pairs):
    rules = tuple(Rule(where=w, weights=f, activations=a[0] if a else None) for w, f, *a in pairs)
    made = lambda: quantize_model(Transformer(config, rngs=nnx.Rngs(0)), Recipe(rules))
    return jax.jit(made)()


@pytest.fixture(scope="module")
def small():
    """A GPT-2 with a format per matrix: a binary table, fixed scales of inputs, floats of 8 bits, and one matrix as it was."""
    model = quantized(
        gpt2(**SIZES, max_length=8),
        ("tokens", Format(bits=1)),
        (r"0\.attention\.query\.kernel", Format(bits=2, granularity="tensor"), TOKENS),
        (r"attention\.(query|key)\.kernel", Format(floating=True)),
        (r"1\.attention\.out\.kernel", Format(bits=4, granularity="block", num_blocks=2)),
        (r"up\.kernel", Format(bits=3, symmetric=False, granularity="group", group_size=8, integer_zero=False)),
        (r"down\.kernel", Format(bits=1, granularity="tensor"), TENSOR),
    )  # fmt: skip
    count = 0

    def fixed(weight):
        nonlocal count
        count += 1
        scales = jnp.arange(1.0, 3.0)[: len(weight.data)] / count
        return dataclasses.replace(weight, input_scale=scales, input_zero=-scales)

    return map_weights(model, fixed, r"down\.kernel")


@pytest.fixture
def folder(small, tmp_path):
    save_packed(small, tmp_path, layout="effscale")
    return tmp_path


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_there_and_back(small, folder):
    """Codes, scales, formats and the groups that layers lie in, in one file and in several."""
    assert [group.repeat for group in small.config.groups] == [1, 1]
    same(load_packed(folder), small)
    save_packed(small, folder, layout="effscale", max_shard_size=2000)
    assert (folder / "model.safetensors.index.json").is_file()
    same(load_packed(folder), small)


def test_transformers_refuses_the_folder(folder):
    """It must not open the folder with random weights, as it does if a method is named that it does not know."""
    transformers = pytest.importorskip("transformers", reason="asks transformers itself")
    with pytest.raises(ValueError, match="quant_method"):
        transformers.GPT2LMHeadModel.from_pretrained(folder)


def test_fused_projections(tmp_path):
    """Of BLOOM's one tensor for query, key and value, each may be packed in another way, or not at all."""
    small = quantized(
        bloom(**SIZES), ("query", Format(bits=1, granularity="tensor")), ("value", Format(bits=4))
    )
    save_packed(small, tmp_path, layout="effscale")
    same(load_packed(tmp_path), small)
    infos = SafetensorsFile(tmp_path / "model.safetensors").infos
    name = "transformer.h.0.self_attention.query_key_value.weight"
    assert infos[f"{name}.0.data"].shape == (32, 4)
    assert infos[f"{name}.1"].shape == (32, 32)
    assert f"{name}.0.zero" not in infos


def test_one_bit_is_small(folder):
    """A binary matrix of 32 x 128: its bits and one scale."""
    file = SafetensorsFile(folder / "model.safetensors")
    parts = [name for name in file.infos if "h.0.mlp.c_proj.weight" in name]
    assert sum(file.read(name).nbytes for name in parts) == 32 * 128 // 8 + 3 * 4


def rewrite(folder, change=lambda tensors: None, describe=lambda given: None):
    """Rewrites the folder with other tensors, or another description in the header."""
    file = SafetensorsFile(folder / "model.safetensors")
    tensors = {name: np.array(file.read(name)) for name in file.infos}
    given = json.loads(file.metadata[KEY])
    change(tensors)
    describe(given)
    write_tensors(folder, tensors.items(), metadata={KEY: json.dumps(given)})


UP = "transformer.h.0.mlp.c_fc.weight"
DOWN = "transformer.h.1.mlp.c_proj.weight"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t.pop(f"{UP}.0.scale"), rf"{UP}\.0\.scale is missing"),
        (lambda t: t.pop(f"{UP}.0.zero"), rf"{UP}\.0\.zero is missing"),
        (lambda t: t.pop(f"{DOWN}.0.input_zero"), rf"{DOWN}\.0\.input_zero is missing"),
        (lambda t: t.update({f"{DOWN}.0.zero": t[f"{DOWN}.0.scale"]}), rf"{DOWN}\.0\.zero is not allowed"),
        (lambda t: t.update({f"{UP}.0.scale": np.zeros((3, 128), np.float32)}),
         r"scale must be float32 \[4, 128\] for 128 x 32 codes, int3.*, got float32 \[3, 128\]"),
        (lambda t: t.update({f"{UP}.0.data": np.zeros((128, 15), np.int8)}), rf"{UP}.* 8 does not divide 30 inputs"),
        (lambda t: t.update({f"{UP}.0.data": np.zeros((128, 16), np.uint8)}), rf"{UP}\.0\.data must be rows of int8, got uint8"),
        (lambda t: t.update({
            f"{UP}.0.data": np.zeros((64, 16), np.int8),
            f"{UP}.0.scale": np.zeros((4, 64), np.float32), f"{UP}.0.zero": np.zeros((4, 64), np.float32),
        }), r"h\.0\.mlp\.c_fc\.weight must have the shape \[32, 128\] .*, got \[32, 64\]"),
        (lambda t: t.update({UP: np.zeros((32, 128), np.float32)}), rf"{UP} is stored twice, packed and as an array"),
        (lambda t: t.update({f"{UP}.9.data": np.zeros(1, np.int8)}), r"unexpected: .*c_fc\.weight\.9\.data"),
    ],
)  # fmt: skip
def test_wrong_tensors(folder, change, what):
    rewrite(folder, change)
    with pytest.raises(FolderError, match=what):
        load_packed(folder)


@pytest.mark.parametrize(
    ("describe", "what"),
    [
        (lambda d: d.update(version=2), "version 2 of effscale's layout, and this effscale reads version 1"),
        (lambda d: d.pop("version"), "version is missing"),
        (lambda d: d["weights"][UP].update(shape=[1, -1]), rf"{UP}: its shape in .* got \[1, -1\]"),
        (lambda d: d["weights"][UP].update(parts=[]), rf"{UP}: its parts in .* got \[\]"),
        (lambda d: d["weights"][UP]["parts"][0]["format"].update(bits=5), rf"{UP}.*bits must be .*, got 5"),
        (lambda d: d["weights"][UP]["parts"][0]["format"].update(color=1), rf"{UP}.*color"),
        (lambda d: d["weights"][UP].update(shape=[32, 64]), r"wrong shape: h\.0\.mlp\.c_fc\.weight"),
        (lambda d: d["weights"].pop(UP), r"missing: h\.0\.mlp\.c_fc\.weight"),
    ],
)  # fmt: skip
def test_wrong_descriptions(folder, describe, what):
    rewrite(folder, describe=describe)
    with pytest.raises(FolderError, match=what):
        load_packed(folder)


def test_damage(small, folder):
    """A file that is cut short, a flipped bit in the description, and files that another program rewrote."""
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(FolderError, match="is not a valid safetensors file"):
        load_packed(folder)
    (length,) = struct.unpack("<Q", whole[:8])
    start = whole.index(b"effscale.packed")
    for place in (start, start + 14, whole.index(b"num_blocks"), whole.index(b"is_table")):
        assert place < length
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(FolderError, match="is not a valid safetensors file"):
            load_packed(folder)
    path.write_bytes(whole)
    file = SafetensorsFile(path)
    write_tensors(folder, [(name, file.read(name)) for name in file.infos])
    with pytest.raises(FolderError, match=r"have no 'effscale\.packed' in their header"):
        load_packed(folder)


def test_other_ways_to_load_and_save(small, folder, unchecked):
    with pytest.raises(FolderError, match=r"'effscale'.*with effscale\.interop\.load_packed"):
        load_pretrained(folder)
    with pytest.raises(
        ValueError, match="layout must be one of compressed-tensors, effscale, got 'gguf'"
    ):
        save_packed(small, folder, layout="gguf")
