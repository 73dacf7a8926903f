"""GGUF's blocks in packed weights: the numbers that the gguf package and llama.cpp have, and no floats on the way."""

import os
import subprocess
import sys
import tracemalloc

import jax
import numpy as np
import pytest

from effscale.experiments.shared import assets
from effscale.interop import FolderError, load_packed, load_pretrained
from effscale.interop.gguf.blocks import FORMATS, from_blocks
from effscale.models import llama
from effscale.quant import dequantize_model
from effscale.quant.packed import PackedWeight
from effscale.quant.quantizers import Quantized

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

LAYER = {
    "attention.query": "attn_q",
    "attention.key": "attn_k",
    "attention.value": "attn_v",
    "attention.out": "attn_output",
    "feed_forward.gate": "ffn_gate",
    "feed_forward.up": "ffn_up",
    "feed_forward.down": "ffn_down",
}
SIZES = {"num_layers": 3, "d_model": 64, "num_heads": 4, "num_kv_heads": 2, "d_ff": 96}
IDS = np.random.default_rng(0).integers(0, 50, (2, 8)).astype(np.int32)

run = jax.jit(lambda model, ids: model(ids))


def write(path, kinds, **sizes):
    """A random Llama; ``kinds`` gives the type of a tensor of a layer from its name."""
    sizes = SIZES | {"vocab_size": 50} | sizes
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(sizes["num_layers"])
    writer.add_context_length(64)
    writer.add_embedding_length(sizes["d_model"])
    writer.add_feed_forward_length(sizes["d_ff"])
    writer.add_head_count(sizes["num_heads"])
    writer.add_head_count_kv(sizes["num_kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    head = sizes["d_model"] // sizes["num_heads"]
    out = {
        "attn_k": head * sizes["num_kv_heads"], "attn_v": head * sizes["num_kv_heads"],
        "ffn_gate": sizes["d_ff"], "ffn_up": sizes["d_ff"], "token_embd": sizes["vocab_size"],
    }  # fmt: skip

    def add(name, kind):
        short = name.split(".")[-2]
        if short.endswith("norm"):
            writer.add_tensor(name, random.uniform(0.5, 2, sizes["d_model"]).astype(np.float32))
            return
        shape = (
            out.get(short, sizes["d_model"]),
            sizes["d_ff" if short == "ffn_down" else "d_model"],
        )
        values = (random.normal(size=shape) / np.sqrt(shape[1])).astype(np.float32)
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", kinds("token_embd"))
    add("output_norm.weight", None)
    for layer in range(sizes["num_layers"]):
        for short in ("attn_norm", "ffn_norm", *LAYER.values()):
            add(f"blk.{layer}.{short}.weight", kinds(f"blk.{layer}.{short}"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", FORMATS)
def test_the_numbers_of_a_block(kind):
    """Against the gguf package, with blocks of zeros, of one sign and of large numbers."""
    x = np.random.default_rng(0).normal(size=(5, 96)).astype(np.float32)
    x[0, :32], x[1, 32:64], x[2] = 0, np.abs(x[1, 32:64]), x[2] * 1e3
    of = gguf.GGMLQuantizationType[kind]
    data = gguf.quants.quantize(x, of)
    codes, scale, zero = from_blocks(data, FORMATS[kind])
    assert codes.dtype == np.int8
    assert codes.min() >= -128 // (1 if kind == "Q8_0" else 16)
    turned = Quantized(codes.T, scale.T, None if zero is None else zero.T, FORMATS[kind])
    np.testing.assert_array_equal(turned.values().T, gguf.quants.dequantize(data, of))


def test_golden_blocks():
    """By the bytes: d = 0.5, and -0.25 with m = 1; low halves first."""
    half, quarter, one = (np.float16(v).tobytes() for v in (0.5, -0.25, 1))
    nibbles = bytes(0xF0 + i for i in range(16))
    row = np.frombuffer(half + nibbles, np.uint8)[None]
    codes, scale, _ = from_blocks(row, FORMATS["Q4_0"])
    assert (codes * scale)[0].tolist() == [*(0.5 * (i - 8) for i in range(16)), *[3.5] * 16]
    codes, scale, zero = from_blocks(
        np.frombuffer(quarter + one + nibbles, np.uint8)[None], FORMATS["Q4_1"]
    )
    assert (codes * scale + zero)[0].tolist() == [*(1 - i / 4 for i in range(16)), *[-2.75] * 16]
    signed = np.arange(-16, 16, dtype=np.int8).tobytes()
    codes, scale, _ = from_blocks(np.frombuffer(half + signed, np.uint8)[None], FORMATS["Q8_0"])
    assert (codes * scale)[0].tolist() == [i / 2 for i in range(-16, 16)]


def test_a_model_of_every_type(tmp_path):
    """The numbers and logits of the float load, also where types change between layers, and beside types that are not packed."""

    def kinds(name):
        mixed = {"token_embd": "Q8_0", "blk.0.ffn_down": "Q4_1", "blk.1.attn_v": "F16"}
        return mixed.get(name, "Q8_0" if "attn_o" in name else "Q4_0")

    path = write(tmp_path / "a.gguf", kinds)
    packed, floats = load_packed(path), load_pretrained(path)
    assert [group.repeat for group in packed.config.groups] == [1, 1, 1]
    first = packed.groups[0].blocks[0]
    assert first.attention.query.kernel.get_value().format == FORMATS["Q4_0"]
    assert first.feed_forward.down.kernel.get_value().format == FORMATS["Q4_1"]
    assert packed.embed.tokens.embedding.get_value().is_table
    assert isinstance(packed.groups[1].blocks[0].attention.value.kernel.get_value(), jax.Array)
    np.testing.assert_allclose(run(packed, IDS), run(floats, IDS), atol=2e-6)
    dense = jax.jit(dequantize_model)(packed)
    for group, layer in zip(dense.groups, range(3), strict=True):
        for name in LAYER:
            module, leaf = name.split(".")
            of = lambda block, m=module, n=leaf: getattr(getattr(block, m), n).kernel.get_value()
            np.testing.assert_array_equal(
                of(group.blocks[0])[0], of(floats.groups[0].blocks[0])[layer], err_msg=name
            )


def test_nothing_to_pack(tmp_path):
    with pytest.raises(
        FolderError, match="tensors of F16, F32; load_packed supports the packed types Q8_0, Q4"
    ):
        load_packed(write(tmp_path / "a.gguf", lambda name: "F16", num_layers=1))


def test_no_floats_on_the_way(tmp_path):
    """NumPy's memory, in which arrays are filled, stays far below that of the float model; the float load needs it all."""
    path = write(
        tmp_path / "a.gguf", lambda name: "Q4_0", num_layers=6, d_model=128, d_ff=512, vocab_size=32
    )
    config = llama(num_layers=6, d_model=128, num_heads=4, num_kv_heads=2, d_ff=512, vocab_size=32)

    def peak(load):
        load(path)  # compiles
        tracemalloc.start()
        load(path)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    from effscale.models import num_params

    exact = 4 * num_params(config)
    assert peak(load_pretrained) > exact
    assert peak(load_packed) < 0.4 * exact


RESIDENT = """
import pathlib, sys
from effscale import interop, quant
import jax, gguf

def kilobytes(key):
    return int(pathlib.Path("/proc/self/status").read_text().partition(key)[2].split()[0])

jax.block_until_ready(jax.numpy.zeros(1))
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak of the imports is forgotten
before = kilobytes("VmRSS:")
model = getattr(interop if sys.argv[1] == "load_pretrained" else quant, sys.argv[1])(sys.argv[2])
size = sum(x.nbytes for x in jax.tree.leaves(model)) // 1024
print(kilobytes("VmHWM:") - before, kilobytes("VmRSS:") - before, size)
"""


@pytest.mark.slow  # two processes, each of which reads a model of 135 million parameters
def test_resident_memory():
    """SmolLM2: while it is loaded a process needs less than 0.4 of what the float model alone takes."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of resident memory is read from Linux's /proc")
    try:
        file = assets.smollm2_file()
    except assets.MissingAssetError as error:
        pytest.skip(str(error))
    found = {}
    for how in ("load_packed", "load_pretrained"):
        environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-c", RESIDENT, how, str(file)],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        found[how] = [int(word) for word in done.stdout.split()]
    peak, stays, size = found["load_packed"]
    float_peak, _, float_size = found["load_pretrained"]
    assert float_peak > float_size > 500_000
    assert size < 0.3 * float_size
    assert peak < 0.4 * float_size
    assert stays < 0.35 * float_size


@pytest.mark.slow  # two forward passes of a model of 135 million parameters
def test_smollm2_computes_the_same():
    try:
        file = assets.smollm2_file()
    except assets.MissingAssetError as error:
        pytest.skip(str(error))
    ids = np.random.default_rng(0).integers(0, 49152, (1, 64)).astype(np.int32)
    packed = load_packed(file)
    weights = jax.tree.leaves(packed, is_leaf=lambda x: isinstance(x, PackedWeight))
    assert sum(isinstance(weight, PackedWeight) for weight in weights) == 8
    wanted = np.asarray(run(load_pretrained(file), ids))
    np.testing.assert_allclose(run(packed, ids), wanted, atol=1e-4 * np.abs(wanted).max())
