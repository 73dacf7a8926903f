"""Folders in compressed-tensors' layout: what transformers makes of ours, and what we make of the library's."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from effscale.interop import load_pretrained, save_pretrained
from effscale.interop.files.safetensors import SafetensorsFile
from effscale.interop.files.writer import write_tensors
from effscale.interop.save import their_tensors
from effscale.models import ClassHead, Transformer, bert, bloom, llama
from effscale.parallel import MeshConfig
from effscale.quant import (
    Format,
    Recipe,
    Rule,
    dequantize_model,
    load_packed,
    quantize_model,
    save_packed,
    w4a8,
    w8a8,
)
from effscale.quant.files.words import from_words, to_words

SIZES = {"num_layers": 2, "d_model": 32, "num_heads": 2, "d_ff": 48, "vocab_size": 50}
LLAMA = llama(**SIZES, num_kv_heads=1)
IDS = np.random.default_rng(0).integers(0, 50, (2, 8)).astype(np.int32)
TOKENS = Format(granularity="token", spread="centred")
GROUPS = Format(bits=4, granularity="group", group_size=16)
LAYERS = r"layers\..*kernel"

run = jax.jit(lambda model, ids: model(ids))


def recipe(*pairs):
    """Rules of (where, weights) or (where, weights, activations)."""
    return Recipe(
        tuple(Rule(where=w, weights=f, activations=a[0] if a else None) for w, f, *a in pairs)
    )


ATTENTION = r"layers\..*attention\..*kernel"
# A format per matrix of a layer.
SYMMETRIC = {
    "query": (Format(),),
    "key": (Format(granularity="tensor"),),
    "value": (GROUPS,),
    "out": (Format(bits=4),),
    "gate": (Format(bits=2),),
    "up": (Format(bits=3, granularity="block", num_blocks=2),),
    "down": (Format(bits=4, granularity="group", group_size=8),),
}
EVERY = SYMMETRIC | {
    "key": (Format(), TOKENS),
    "out": (Format(bits=4, granularity="group", group_size=16, symmetric=False),),
    "down": (Format(symmetric=False), TOKENS),
}


def by_matrix(formats):
    return recipe(*((rf"layers\..*{name}\.kernel", *what) for name, what in formats.items()))


RECIPES = {
    "every format": by_matrix(EVERY),
    "symmetric": by_matrix(SYMMETRIC),
    "W4/8A8": recipe((ATTENTION, Format(), TOKENS), (LAYERS, GROUPS, TOKENS)),
    "W4 asymmetric": recipe((LAYERS, Format(bits=4, symmetric=False))),
    "by layer": recipe((r"layers\.1\..*kernel", GROUPS), (LAYERS, Format(), TOKENS)),
}


make = jax.jit(lambda config: Transformer(config, rngs=nnx.Rngs(0)), static_argnums=0)
pack = jax.jit(quantize_model, static_argnums=1)
unpack = jax.jit(dequantize_model)


def quantized(model, name):
    """In one program: operation by operation, most of the time would be spent compiling."""
    return pack(model, RECIPES[name] if isinstance(name, str) else name)


@pytest.fixture(scope="module")
def model():
    return make(LLAMA)


def values(model):
    """The numbers that the weights stand for, by their names in files."""
    return dict(their_tensors(unpack(model)))


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
    save_packed(small, tmp_path / "one")
    again = load_packed(tmp_path / "one")
    wanted, found = values(small), values(again)
    assert wanted.keys() == found.keys()
    for key, array in wanted.items():
        tolerance = 1e-6 if "o_proj" in key or "down_proj" in key else 0
        np.testing.assert_allclose(found[key], array, rtol=0, atol=tolerance, err_msg=key)
    save_packed(again, tmp_path / "two")
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
    assert shown["model.embed_tokens.weight"] == ((50, 32), "float32")
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
    save_packed(small, tmp_path, max_shard_size=10_000)
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
    for key, array in values(small).items():
        np.testing.assert_array_equal(values(sharded)[key], array, err_msg=key)


def test_the_tokenizer_goes_along_and_the_way_to_floats(model, tmp_path):
    """`like=` takes the files of the original folder; `save_pretrained` of the loaded model writes floats, and says so."""
    save_pretrained(model, tmp_path / "float")
    (tmp_path / "float" / "tokenizer.json").write_text("{}")
    small = quantized(model, "symmetric")
    save_packed(small, tmp_path / "packed", like=tmp_path / "float")
    assert (tmp_path / "packed" / "tokenizer.json").read_text() == "{}"
    save_pretrained(load_packed(tmp_path / "packed"), tmp_path / "again", like=tmp_path / "packed")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    dense = load_pretrained(tmp_path / "again")
    for key, array in values(small).items():
        np.testing.assert_array_equal(values(dense)[key], array, err_msg=key)


# Of torch and transformers: what we do is not what they warn of.
quiet = pytest.mark.filterwarnings("ignore")


def torch_logits(folder, dequantize=False):
    """transformers' logits, or an image's or text's classes; with the weights as floats where ``dequantize``."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    hf = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("compressed_tensors", reason="`make test` installs it for Python 3.11")
    from transformers.utils.quantization_config import CompressedTensorsConfig

    hf.utils.logging.disable_progress_bar()
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    found = getattr(hf, architecture).from_pretrained(folder, dtype=torch.float32, **how).eval()
    with torch.no_grad():
        return found(torch.tensor(IDS.astype(np.int64))).logits.numpy(), found


@quiet
@pytest.mark.parametrize(("name", "dequantize"), [("symmetric", False), ("W4 asymmetric", True)])
def test_transformers_computes_the_same(name, dequantize, model, tmp_path):
    """By default, where each module has a scheme of its own; asymmetric 4 bits dequantized, as it loads them in no other way."""
    small = quantized(model, name)
    save_packed(small, tmp_path)
    theirs, _ = torch_logits(tmp_path, dequantize)
    np.testing.assert_allclose(theirs, run(small, IDS), atol=2e-6)


@quiet
@pytest.mark.parametrize("family", ["bert", "bloom"])
def test_other_families(family, tmp_path):
    """A classifier of its own format beside the layers, and query, key and value in one tensor."""
    if family == "bert":
        config = bert(**SIZES, max_length=16, pooler=True)
        config = dataclasses.replace(config, heads=(ClassHead(num_classes=8, pool="pooled"),))
    else:
        config = bloom(**{k: v for k, v in SIZES.items() if k != "d_ff"})
    model = make(config)
    rules = [(LAYERS, GROUPS)] + ([("heads.*kernel", Format())] if family == "bert" else [])
    small = quantized(model, recipe(*rules))
    save_packed(small, tmp_path)
    theirs, _ = torch_logits(tmp_path)
    for one in (small, load_packed(tmp_path)):
        ours = run(one, IDS)
        ours = ours["classes"] if family == "bert" else ours
        np.testing.assert_allclose(theirs, ours, atol=2e-6)


@quiet
def test_quantized_inputs(model, tmp_path):
    """One layer after another: the same products where the largest number of each row is positive.

    A largest negative one lies half-way between two codes in this spread, and the last bit of a division decides.
    """
    torch = pytest.importorskip("torch", reason="torch is not installed")
    small = quantized(model, "W4/8A8")
    save_packed(small, tmp_path)
    theirs, found = torch_logits(tmp_path)
    x = np.random.default_rng(1).normal(size=(7, 32)).astype(np.float32)
    x[:, 3] = 5.0
    block, layer = small.groups[0].blocks[0], found.model.layers[1]
    for ours, module in (
        (block.attention.query, layer.self_attn.q_proj),
        (block.feed_forward.up, layer.mlp.up_proj),
    ):
        kernel = jax.tree.map(lambda a: a[1], ours.kernel.get_value())
        with torch.no_grad():
            wanted = module(torch.tensor(x[None]))[0].numpy()
        got = np.asarray(kernel.matmul(jnp.asarray(x), None, None))
        np.testing.assert_allclose(got, wanted, atol=2e-6)
        plain = x @ np.asarray(kernel.dense())
        assert np.abs(wanted - plain).max() > 1e-3  # their inputs are quantized, too
    np.testing.assert_allclose(theirs, run(small, IDS), atol=0.05)


@quiet
@pytest.mark.parametrize(
    ("bits", "symmetric", "inputs"),
    [(8, True, True), (8, False, True), (4, True, False), (4, False, False), (2, True, False)],
)
def test_folders_of_the_library(bits, symmetric, inputs, tmp_path):
    """A Llama that compressed-tensors itself compressed, with names of classes as targets and scales of its own."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    hf = pytest.importorskip("transformers", reason="transformers is not installed")
    library = pytest.importorskip("compressed_tensors", reason="it is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    del library
    torch.manual_seed(0)
    whole = hf.LlamaForCausalLM(hf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=50,
        tie_word_embeddings=True,
    )).eval()  # fmt: skip
    args = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
    args |= {"strategy": "channel"} if inputs else {"strategy": "group", "group_size": 16}
    tokens = {"num_bits": 8, "strategy": "token", "dynamic": True} if inputs else None
    scheme = {"targets": ["Linear"], "weights": args, "input_activations": tokens}
    layout = "int-quantized" if inputs else "pack-quantized"
    compressor, parsed = (
        BaseCompressor.get_value_from_registry(layout),
        QuantizationScheme(**scheme),
    )
    tensors, dense = {}, {}
    for name, tensor in whole.state_dict().items():
        if not name.endswith("_proj.weight"):
            if name != "lm_head.weight":
                tensors[name] = tensor.numpy()
            continue
        grouped = tensor.reshape(len(tensor), -1, 16 if not inputs else tensor.shape[1])
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), parsed.weights)
        state = {"weight": tensor, "weight_scale": scale}
        if not symmetric:
            state["weight_zero_point"] = zero.to(torch.int8)
        packed = compressor.compress(state, parsed)
        dense[name] = compressor.decompress(packed, parsed)["weight"].numpy()
        module = name.removesuffix("weight")
        tensors |= {module + part: value.numpy() for part, value in packed.items()}
    whole.config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": scheme}, "global_compression_ratio": None,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    write_tensors(tmp_path, tensors.items())
    found = load_packed(tmp_path)
    kernel = found.groups[0].blocks[0].feed_forward.down.kernel.get_value()
    assert kernel.format.bits == bits
    assert kernel.activations == (TOKENS if inputs else None)
    ours = values(found)
    for name, array in dense.items():
        np.testing.assert_allclose(ours[name], array, atol=1e-7, err_msg=name)
