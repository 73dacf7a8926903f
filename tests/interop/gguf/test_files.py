import contextlib
import math
import pathlib
import struct
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effscale.interop import FolderError, load_tokenizer
from effscale.interop.gguf.file import FREQUENCIES, GGUFFile, gguf_config
from effscale.interop.gguf.header import read_header
from effscale.interop.source import open_source
from effscale.interop.tensors import Tensors

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

CONFIG = {
    "block_count": 1,
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 64,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}


def write(path, *, tensors=None, architecture="llama", kinds=None, alignment=None, **more):
    """A GGUF file by the gguf package's own writer; ``more`` are keys, ``__`` for a dot."""
    writer = gguf.GGUFWriter(path, architecture)
    if alignment:
        writer.add_custom_alignment(alignment)
    settings = CONFIG | {key.replace("__", "."): value for key, value in more.items()}
    for key, value in settings.items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        if value is not None:
            name = key if key.startswith(("tokenizer.", "split.")) else f"{architecture}.{key}"
            add[type(value)](name, value)
    if tensors is None:
        tensors = {"token_embd.weight": np.zeros((8, 32), np.float32)}
    for name, tensor in tensors.items():
        kind = (kinds or {}).get(name)
        if kind is None:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    values = np.random.default_rng(0).standard_normal((6, 32)).astype(np.float32)
    tensors = {"token_embd.weight": values, "output_norm.weight": values[0], "odd": values[:3]}
    return write(
        tmp_path_factory.mktemp("gguf") / "small.gguf",
        tensors=tensors,
        kinds={"odd": gguf.GGMLQuantizationType.Q8_0},
        tokenizer__ggml__tokens=["a", "b"],
        tokenizer__ggml__scores=[0.5, 1.5],
        tokenizer__ggml__add_bos_token=False,
    )


QUANTIZED = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS", "TQ2_0")


@pytest.mark.parametrize("kind", QUANTIZED)
def test_every_packed_type_is_read_in_float32_and_row_major(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    values = np.random.default_rng(1).standard_normal((5, 512)).astype(np.float32)
    packs = kind in gguf.quants._type_traits or kind == gguf.GGMLQuantizationType.F16
    try:
        packed = gguf.quants.quantize(values, kind) if packs else None
    except NotImplementedError:
        packed = None
    if packed is None:
        # The package unpacks this type only; zeros are what it makes of zero bytes.
        size = gguf.quants.quant_shape_to_byte_shape(values.shape, kind)
        packed = np.zeros(size, np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("w", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "a.gguf")
    assert isinstance(file, Tensors)
    assert file.infos["w"].shape == (5, 512)
    tensor = file.read("w")
    assert tensor.dtype == file.infos["w"].dtype == np.float32
    assert not tensor.flags.writeable
    np.testing.assert_array_equal(tensor, gguf.quants.dequantize(packed, kind).reshape(5, 512))


def test_names_shapes_and_metadata_are_those_of_the_package_s_reader(small):
    reader = gguf.GGUFReader(small)
    header = read_header(small)
    assert [tensor.name for tensor in reader.tensors] == list(header.entries)
    for tensor in reader.tensors:
        entry = header.entries[tensor.name]
        assert entry.shape == tuple(reversed(tensor.shape.tolist()))
        assert (entry.start, entry.size) == (tensor.data_offset, tensor.n_bytes)
    keys = [key for key in reader.fields if not key.startswith("GGUF.")]
    assert keys == list(header.metadata)
    for key in keys:
        value = header.metadata[key]
        value = value.tolist() if isinstance(value, np.ndarray) else value
        assert value == reader.fields[key].contents()


def test_another_alignment(tmp_path):
    tensors = {"a": np.arange(3, dtype=np.float32), "b": np.arange(5, dtype=np.float32)}
    file = GGUFFile(write(tmp_path / "a.gguf", tensors=tensors, alignment=8))
    np.testing.assert_array_equal(file.read("b"), tensors["b"])


def test_the_config_of_a_llama(tmp_path):
    path = write(
        tmp_path / "a.gguf",
        rope__freq_base=5e5,
        rope__dimension_count=8,
        tokenizer__ggml__bos_token_id=1,
        tokenizer__ggml__padding_token_id=2,
    )
    fields = gguf_config(path)
    assert fields.pop("rms_norm_eps") == pytest.approx(1e-5)
    assert fields == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "max_position_embeddings": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "vocab_size": 8,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "dtype": "float32",
        "bos_token_id": 1,
        "pad_token_id": 2,
    }
    zeros = np.zeros((8, 32), np.float32)
    tensors = {"token_embd.weight": zeros, "output.weight": zeros}
    more = {"attention.head_count_kv": None, "attention.key_length": 16}
    fields = gguf_config(write(tmp_path / "b.gguf", tensors=tensors, **more))
    assert not fields["tie_word_embeddings"]
    assert (fields["num_key_value_heads"], fields["head_dim"]) == (4, 16)


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"dimension_count": 4}, {"partial_rotary_factor": 0.5}),
        ({"scaling.type": "none", "scaling.factor": 4.0}, {}),
        ({"scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"scaling.type": "linear", "scaling.factor": 0.0}, {}),
        (
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 16},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        ),
    ],
)
def test_rotary_scaling(tmp_path, keys, wanted):
    path = write(tmp_path / "a.gguf", **{f"rope.{key}": value for key, value in keys.items()})
    default = {"rope_type": "default", "rope_theta": 10000.0}
    assert gguf_config(path)["rope_parameters"] == default | wanted


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_s_factors_become_its_rule(tmp_path, factor):
    # The rule in the words of Llama 3.1's own code: by wavelength, with a part in between.
    factors, wave = [], 2 * np.pi * 5e5 ** (np.arange(0, 64, 2) / 64)
    for length in wave:
        if length < 8192 / 4:
            factors.append(1.0)
        elif length > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / length - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    table = {"token_embd.weight": np.zeros((8, 32), np.float32)}
    tensors = table | {FREQUENCIES: np.array(factors, np.float32)}
    keys = {"attention.key_length": 64, "rope.freq_base": 5e5}
    file = GGUFFile(write(tmp_path / "a.gguf", tensors=tensors, **keys))
    assert FREQUENCIES not in file.infos
    assert gguf_config(file)["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    tensors[FREQUENCIES] = np.linspace(1, 2, 32, dtype=np.float32)
    with pytest.raises(FolderError, match="Llama 3's rule"):
        gguf_config(write(tmp_path / "b.gguf", tensors=tensors, **keys))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2'"),
        ({"expert_count": 8}, "mixture of experts"),
        (
            {"block_count": None},
            r"a\.gguf': llama\.block_count is missing; it must be a whole number from 1 to 2147483647",
        ),
        ({"block_count": 1.5}, r"llama\.block_count must be a whole number from 1.*, got 1\.5"),
        (
            {"attention.head_count": 0},
            r"a\.gguf': llama\.attention\.head_count must be a whole number from 1 to 2147483647, got 0",
        ),
        (
            {"rope.freq_base": "high"},
            r"llama\.rope\.freq_base must be a finite number.*, got 'high'",
        ),
        (
            {"rope.freq_base": 0.0},
            r"a\.gguf': cannot be loaded: llama\.rope\.freq_base must be above 0, got 0\.0\.",
        ),
        (
            {"tensors": {"output.weight": np.zeros((8, 32), np.float32)}},
            r"lacks token_embd\.weight",
        ),
        ({"attention.head_count_kv": [2, 4]}, "differ in size"),
        (
            {"attention.value_length": 16},
            r"a\.gguf': cannot be loaded: its value heads and key heads differ in width\.",
        ),
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, "'longrope'"),
        ({"rope.scaling.attn_factor": 2.0}, "attn_factor"),
    ],
)
def test_what_is_no_llama_of_ours_is_refused(tmp_path, settings, message):
    path = write(tmp_path / "a.gguf", **settings)
    with pytest.raises(FolderError, match=message):
        gguf_config(path)


KEYS = (
    *("block_count", "embedding_length", "attention.head_count", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "expert_count", "rope.freq_base", "rope.scaling.type"),
    *("rope.dimension_count", "rope.scaling.factor", "rope.scaling.original_context_length"),
    *("split.count", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.model", "tokenizer.ggml.pre"),
    *("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type"),
    *("tokenizer.ggml.bos_token_id", "tokenizer.ggml.add_bos_token"),
)
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": ["a", "b", "ab"],
    "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.add_bos_token": True,
}  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_a_key_of_any_type_is_read_or_refused(tmp_path, key):
    for value in (True, 7, 2**32 - 1, 2.5, math.nan, "text", [1, 2], ["a", "b"], [0.5], [True]):
        path = write(tmp_path / "a.gguf", **TOKENIZER | {key: value})
        for read in (open_source, load_tokenizer):
            with contextlib.suppress(FolderError):
                assert read(path) is not None


def test_no_more_layers_than_tensors(tmp_path):
    path = write(tmp_path / "a.gguf", block_count=2_000_000_000)
    with pytest.raises(
        FolderError,
        match=r"a\.gguf: num_hidden_layers must be at most the number of tensors, 1, got 2000000000",
    ):
        open_source(path)


def test_no_more_frequencies_than_the_tensor_of_their_factors(tmp_path):
    tensors = {
        "token_embd.weight": np.zeros((8, 32), np.float32),
        FREQUENCIES: np.ones(4, np.float32),
    }
    path = write(tmp_path / "a.gguf", tensors=tensors, **{"rope.dimension_count": 2**31 - 2})
    with pytest.raises(
        FolderError,
        match=r"a\.gguf': cannot be loaded: rope_freqs\.weight has the invalid shape \[4\]\.",
    ):
        gguf_config(path)


def test_a_part_of_a_split_model_and_types_that_are_not_floats_are_refused(tmp_path):
    with pytest.raises(FolderError, match="one of 3 parts"):
        GGUFFile(write(tmp_path / "a.gguf", **{"split.count": 3}))
    file = GGUFFile(write(tmp_path / "b.gguf", tensors={"n": np.arange(4, dtype=np.int32)}))
    with pytest.raises(FolderError, match="type I32"):
        file.read("n")
    with pytest.raises(FolderError, match="no tensor 'm'"):
        file.read("m")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (
            b"GGUF",
            r"a\.gguf': is not a valid GGUF file: at byte 4 it declares 4 bytes, but 0 are left",
        ),
        (b"PK\x03\x04" + bytes(60), "does not begin with GGUF"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), "other byte order"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(16), "its version is 1"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**63),
            "it declares 9223372036854775808 bytes, but 0 are left",
        ),
        # An array of 2**60 numbers, for which nobody has the memory.
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 4, 2**60),
            "it declares",
        ),
    ],
)
def test_what_is_no_gguf_file(tmp_path, content, message):
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(FolderError, match=message):
        GGUFFile(path)


def test_a_missing_file_and_a_missing_package_are_named(tmp_path, small, monkeypatch):
    with pytest.raises(
        FolderError, match=r"none\.gguf': is not a valid GGUF file: the file does not exist"
    ):
        GGUFFile(tmp_path / "none.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="pip install gguf"):
        GGUFFile(small)


def test_no_cut_file_is_opened(small, tmp_path):
    content = small.read_bytes()
    path = tmp_path / "cut.gguf"
    # The last tensor's padding may be missing, its data not.
    for size in range(len(content) - 31, -1, -7):
        path.write_bytes(content[:size])
        with pytest.raises(FolderError):
            GGUFFile(path)
    path.write_bytes(content + bytes(64))
    with pytest.raises(FolderError, match="its tensors end at byte"):
        GGUFFile(path)


@given(st.data())
def test_a_flipped_bit_in_the_header_is_an_error_or_another_value(small, data):
    content = bytearray(small.read_bytes())
    sound = read_header(small)
    begin = min(entry.start for entry in sound.entries.values())
    bit = data.draw(st.integers(0, 8 * begin - 1))
    content[bit // 8] ^= 1 << bit % 8
    path = pathlib.Path(small).with_name("flipped.gguf")
    path.write_bytes(content)
    try:
        file = GGUFFile(path)
    except FolderError:
        return
    # What remains are names, values, and padding: the tensors are where they were.
    layout = lambda header: [(e.start, e.size) for e in header.entries.values()]
    assert layout(file.header) == layout(sound)
    for name in file.infos:
        assert file.read(name).dtype == np.float32


def test_a_file_cut_after_it_was_opened(small, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(small.read_bytes())
    file = GGUFFile(path)
    with open(path, "r+b") as stream:
        stream.truncate(path.stat().st_size - 64)
    with pytest.raises(FolderError, match=r"a\.gguf': was truncated after it was opened\."):
        file.read("odd")
