"""Folders in compressed-tensors' layout: what transformers makes of ours, and what we make of the library's."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effscale.interop import load_packed, save_packed
from effscale.interop.files.safetensors import SafetensorsFile
from effscale.interop.files.writer import write_tensors
from effscale.models import ClassHead, bert, bloom
from effscale.moe import MoEConfig, RouterConfig, with_experts
from effscale.quant import Format, w4a16
from tests.quant.packed_models import (
    GROUPS,
    IDS,
    LAYERS,
    LLAMA,
    SIZES,
    TOKENS,
    make,
    quantized,
    recipe,
    run,
    values,
)

torch = pytest.importorskip("torch", reason="torch is not installed")
hf = pytest.importorskip("transformers", reason="transformers is not installed")
library = pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")


@pytest.fixture(scope="module")
def model():
    return make(LLAMA)


# Of torch and transformers: what we do is not what they warn of.
quiet = pytest.mark.filterwarnings("ignore")


def torch_logits(folder, dequantize=False):
    """transformers' logits, or an image's or text's classes; with the weights as floats where ``dequantize``."""
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
    save_packed(small, tmp_path, dtype="float32")
    theirs, _ = torch_logits(tmp_path, dequantize)
    np.testing.assert_allclose(theirs, run(small, IDS), atol=2e-6)


@quiet
def test_mixtures(tmp_path):
    """Routers stay in float, and attention has a format of its own."""
    experts = MoEConfig(
        num_experts=4,
        expert=LLAMA.blocks[0].feed_forward,
        router=RouterConfig(k=2, capacity_factor=None, eval_capacity_factor=None),
    )
    model = make(with_experts(LLAMA, experts, every=1))
    small = quantized(model, w4a16(16))
    save_packed(small, tmp_path, dtype="float32")
    theirs, found = torch_logits(tmp_path)
    assert isinstance(found, hf.MixtralForCausalLM)
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
    save_packed(small, tmp_path, dtype="float32")
    theirs, _ = torch_logits(tmp_path)
    for one in (small, load_packed(tmp_path)):
        ours = run(one, IDS)
        ours = ours["classes"] if family == "bert" else ours
        np.testing.assert_allclose(theirs, ours, atol=2e-6)


@quiet
def test_quantized_inputs(model, tmp_path):
    """One layer after another: the last bit of a division decides on a largest negative number, half-way between two codes."""
    small = quantized(model, "W4/8A8")
    save_packed(small, tmp_path, dtype="float32")
    theirs, found = torch_logits(tmp_path)
    x = np.random.default_rng(1).normal(size=(64, 32)).astype(np.float32)
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
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

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
    save_packed(found, tmp_path / "again")
    again = SafetensorsFile(tmp_path / "again" / "model.safetensors")
    for name in (name for name in tensors if "_proj." in name):
        np.testing.assert_array_equal(again.read(name), tensors[name], err_msg=name)
