"""Folders in compressed-tensors' layout: what lies in them, and that it comes back; see test_compressed_oracle.py for transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effscale.interop import load_packed, load_pretrained, save_packed, save_pretrained
from effscale.interop.compressed_tensors.reader import from_words, to_words
from effscale.interop.files.safetensors import SafetensorsFile
from effscale.interop.save import their_tensors
from effscale.models import llama
from effscale.parallel import MeshConfig
from effscale.quant import w4a8, w8a8
from tests.quant.packed_models import LLAMA, make, quantized, values


@pytest.fixture(scope="module")
def model():
    return make(LLAMA)


@given(st.sampled_from([2, 4, 8]), st.integers(1, 3), st.integers(1, 40), st.randoms())
def test_words_are_a_stream_of_bits(bits, rows, count, random):
    """Against the definition, with Python's integers: number i, plus 2^(b-1), at bit i b of the row."""
    half = 2 ** (bits - 1)
    codes = [[random.randrange(-half, half) for _ in range(count)] for _ in range(rows)]
    found = to_words(np.array(codes, np.int8), bits)
    assert found.dtype == np.int32
    for row, words in zip(codes, found, strict=True):
        stream = sum((code + half) << (i * bits) for i, code in enumerate(row))
        size = -(-count * bits // 32)
        assert words.tobytes() == stream.to_bytes(4 * size, "little")
    np.testing.assert_array_equal(from_words(found, bits, count), codes)


def test_a_word_of_the_library():
    """What compressed-tensors 0.20 makes of 1, 0, 0, ... in 4 bits."""
    codes = np.eye(1, 16, dtype=np.int8)
    assert [hex(word) for word in to_words(codes, 4).view(np.uint32)[0]] == [
        "0x88888889",
        "0x88888888",
    ]


@pytest.mark.parametrize("name", ["every format", "by layer"])
def test_there_and_back(name, model, tmp_path):
    """The numbers come back to the bit, except where float32 rounds a zero point, and so do files of what came back."""
    small = quantized(model, name)
    save_packed(small, tmp_path / "one", dtype="float32")
    again = load_packed(tmp_path / "one")
    wanted, found = values(small), values(again)
    assert wanted.keys() == found.keys()
    for key, array in wanted.items():
        tolerance = 1e-6 if "o_proj" in key or "down_proj" in key else 0
        np.testing.assert_allclose(found[key], array, rtol=0, atol=tolerance, err_msg=key)
    save_packed(again, tmp_path / "two", dtype="float32")
    files = [SafetensorsFile(tmp_path / d / "model.safetensors") for d in ("one", "two")]
    assert files[0].infos == files[1].infos
    for key in files[0].infos:
        np.testing.assert_array_equal(*(file.read(key) for file in files), err_msg=key)


def test_what_lies_in_the_folder(model, tmp_path):
    """Names, shapes and types of the layout, per group of the recipe, beside what is not quantized."""
    save_packed(quantized(model, "W4/8A8"), tmp_path)
    infos = SafetensorsFile(tmp_path / "model.safetensors").infos
    query, up = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"
    shown = {name: (info.shape, info.dtype.name) for name, info in infos.items()}
    assert shown[f"{query}.weight"] == ((32, 32), "int8")
    assert shown[f"{query}.weight_scale"] == ((32, 1), "float32")
    assert shown[f"{up}.weight_packed"] == ((48, 4), "int32")
    assert shown[f"{up}.weight_scale"] == ((48, 2), "float32")
    assert shown[f"{up}.weight_shape"] == ((2,), "int64")
    assert shown["model.embed_tokens.weight"] == ((50, 32), "bfloat16")
    assert f"{up}.weight" not in shown
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "mixed-precision"
    first, second = config["config_groups"].values()
    assert (first["format"], second["format"]) == ("int-quantized", "pack-quantized")
    assert second["weights"] == {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16, "dynamic": False,
    }  # fmt: skip
    assert r"re:model\.layers\.\d+\.mlp\.up_proj$" in second["targets"]


def test_sizes(tmp_path):
    """Of the quantized layers, at widths where scales are few: 8 bits at most 0.27 of float32, 4 and 8 at most 0.18."""
    config = llama(num_layers=1, d_model=128, num_heads=2, d_ff=512, vocab_size=16)
    model = make(config)
    exact = sum(array.nbytes for name, array in their_tensors(model) if "_proj" in name)
    for one, most in ((w8a8(), 0.27), (w4a8(group_size=64), 0.18)):
        folder = tmp_path / str(most)
        save_packed(quantized(model, one), folder)
        file = SafetensorsFile(folder / "model.safetensors")
        size = sum(file.read(name).nbytes for name in file.infos if "_proj" in name)
        assert size <= most * exact


def test_it_is_loaded_in_its_place(model, tmp_path):
    """Divided over devices from the start, and in another type, as `load_pretrained` does it."""
    small = quantized(model, "W4/8A8")
    save_packed(small, tmp_path, dtype="float32", max_shard_size=10_000)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    mesh = MeshConfig(data=1, fsdp=2, tensor=2).build(jax.devices()[:4])
    with jax.set_mesh(mesh):
        sharded = load_packed(tmp_path, mesh=mesh)
    packed = sharded.groups[0].blocks[0].feed_forward.up.kernel.get_value()
    assert len(packed.data.sharding.device_set) == 4
    assert not packed.data.is_fully_replicated
    half = load_packed(tmp_path, dtype="bfloat16")
    assert half.groups[0].blocks[0].feed_forward.up.kernel.get_value().dtype == jnp.bfloat16
    assert half.embed.tokens.embedding.get_value().dtype == jnp.bfloat16
    found = values(sharded)
    for key, array in values(small).items():
        np.testing.assert_array_equal(found[key], array, err_msg=key)


def test_the_tokenizer_goes_along_and_the_way_to_floats(model, tmp_path):
    """`like=` takes the files of the original folder; `save_pretrained` of the loaded model writes floats, and says so."""
    save_pretrained(model, tmp_path / "float")
    (tmp_path / "float" / "tokenizer.json").write_text("{}")
    small = quantized(model, "symmetric")
    save_packed(small, tmp_path / "packed", dtype="float32", like=tmp_path / "float")
    assert (tmp_path / "packed" / "tokenizer.json").read_text() == "{}"
    save_pretrained(load_packed(tmp_path / "packed"), tmp_path / "again", like=tmp_path / "packed")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    dense = load_pretrained(tmp_path / "again")
    found = values(dense)
    for key, array in values(small).items():
        np.testing.assert_array_equal(found[key], array, err_msg=key)
