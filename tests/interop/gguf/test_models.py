"""Llamas that went through a GGUF file compute what they computed before."""

import jax
import numpy as np
import pytest
from einops import rearrange

from effscale.interop import FolderError, load_pretrained, load_tokenizer, save_pretrained
from effscale.models import ClassHead
from tests.interop.files import bits_of

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
torch = pytest.importorskip("torch", reason="torch is not installed")
hf = pytest.importorskip("transformers", reason="transformers is not installed")

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny(**changes):
    """A random Llama with grouped queries; all widths are multiples of a block of 32."""
    torch.manual_seed(0)
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    return hf.LlamaForCausalLM(hf.LlamaConfig(**settings | changes)).eval()


def their_name(name):
    if name.startswith("model.layers."):
        _, _, layer, *module, leaf = name.split(".")
        return f"blk.{layer}.{LAYER['.'.join(module)]}.{leaf}"
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    return f"{outside[name.removesuffix('.weight')]}.weight"


def convert(model, path, *, kind=None, factors=None, **keys):
    """Writes a GGUF file as llama.cpp's converter does, matrices in ``kind``; the model gets what they are then."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    for key, value in keys.items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
        add[type(value)](f"llama.rope.scaling.{key}", value)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        n = heads.get(name.split(".")[-2])
        values = parameter.numpy()
        if kind is not None and values.ndim == 2:
            values = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
            parameter.copy_(torch.from_numpy(values))
        if n is not None:
            values = rearrange(values, "(h two d) ... -> (h d two) ...", h=n, two=2)
        if kind is not None and values.ndim == 2:
            packed = gguf.quants.quantize(np.ascontiguousarray(values), kind)
            writer.add_tensor(their_name(name), packed, raw_dtype=kind)
        else:
            writer.add_tensor(their_name(name), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def same(path, model):
    ids = np.random.default_rng(0).integers(0, 50, (2, 40)).astype(np.int32)
    with torch.no_grad():
        wanted = model(torch.tensor(ids)).logits.numpy()
    got = jax.jit(lambda ours, ids: ours(ids))(load_pretrained(path), ids)
    np.testing.assert_allclose(got, wanted, atol=1e-4 + 1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [None, "F16", "BF16", "Q8_0", "Q4_1"])
def test_a_llama(tmp_path, tied, kind):
    model = tiny(tie_word_embeddings=tied)
    with torch.no_grad():
        path = convert(model, tmp_path / "a.gguf", kind=kind and gguf.GGMLQuantizationType[kind])
    same(path, model)


@pytest.mark.parametrize(
    ("theirs", "keys"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            {"type": "yarn", "factor": 4.0, "original_context_length": 16},
        ),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            {},
        ),
    ],
)
def test_scaled_rotary_positions(tmp_path, theirs, keys):
    plain = {"rope_type": "default", "rope_theta": 5e5}
    model = tiny(rope_parameters=plain | theirs)
    factors = None
    if theirs["rope_type"] == "llama3":
        rotary = model.model.rotary_emb.inv_freq.numpy()
        factors = (5e5 ** -(np.arange(0, 16, 2) / 16) / rotary).astype(np.float32)
        assert factors.max() == pytest.approx(8.0)
    with torch.no_grad():
        path = convert(model, tmp_path / "a.gguf", factors=factors, **keys)
    same(path, model)


def test_it_goes_on_as_a_hugging_face_folder(tmp_path):
    model = tiny()
    with torch.no_grad():
        path = convert(model, tmp_path / "a.gguf", kind=gguf.GGMLQuantizationType.Q8_0)
    save_pretrained(load_pretrained(path), tmp_path / "folder")
    again = hf.LlamaForCausalLM.from_pretrained(tmp_path / "folder")
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, again.state_dict()[name]), name


def test_a_reward_on_its_trunk(tmp_path):
    with torch.no_grad():
        path = convert(tiny(), tmp_path / "a.gguf")
    score = ClassHead(name="score", num_classes=1, pool="last", bias=False)
    reward = load_pretrained(path, heads=(score,), key=jax.random.key(0))
    assert reward.heads["score"].dense.kernel.get_value().shape == (64, 1)
    whole = bits_of(load_pretrained(path))
    assert {n: b for n, b in bits_of(reward).items() if "heads" not in n}.items() <= whole.items()


def test_biases_that_the_table_lacks_are_named(tmp_path):
    path = tmp_path / "a.gguf"
    model = tiny(attention_bias=True)
    with torch.no_grad():
        convert(model, path)
    with pytest.raises(FolderError, match=r"unexpected: blk\.0\.attn_q\.bias"):
        load_pretrained(path)
    with pytest.raises(
        FolderError,
        match=r"a\.gguf': the tokenizer must be a byte-level BPE \('gpt2'\), the only supported kind in GGUF files, got None",
    ):
        load_tokenizer(path)
