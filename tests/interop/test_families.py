"""Every family's config.json is read as transformers reads it, and what we cannot compute is refused by name."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effscale.interop.describe import essence
from effscale.interop.families import FAMILIES
from effscale.interop.families.fields import ACTIVATIONS
from effscale.interop.source import identify
from effscale.interop.tensors import FolderError, TensorInfo
from effscale.models import Rotary, YarnScaling
from effscale.models.activations import ACTIVATIONS as OURS
from tests.interop.spaces import ARCHITECTURES, SMALL, SPACES, cases

# Fields that only fit together.
SIZES = {name for fields in SMALL.values() for name in fields} | {
    *("head_dim", "num_key_value_heads", "rope_parameters", "layer_types"),
    *(
        "use_sliding_window",
        "sliding_window",
        "num_local_experts",
        "num_experts",
        "num_experts_per_tok",
    ),
    *("image_size", "patch_size", "pooler_output_size"),
}


def read(model_type, fields, architecture=None):
    """Our config of a model without classes."""
    architecture = ARCHITECTURES[model_type][0] if architecture is None else architecture
    fields = fields | {"architectures": [architecture], "add_pooling_layer": False}
    return FAMILIES[model_type].config(fields, {})


def dropouts(config):
    """All rates of a config."""
    attention, block = config.blocks[0].attention, config.blocks[0]
    heads = [getattr(head, "dropout", 0.0) for head in config.heads]
    return attention.dropout, block.dropout, config.inputs.dropout, *heads


def same(one, other):
    assert essence(one) == essence(other)
    assert dropouts(one) == dropouts(other)


@pytest.fixture(scope="module")
def hf():
    return pytest.importorskip("transformers", reason="the oracle is transformers' config classes")


def theirs(hf, model_type, fields):
    """The fields as transformers writes them after it has read ours."""
    return hf.CONFIG_MAPPING[model_type](**fields).to_dict()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_fields_that_are_left_out_are_what_transformers_takes(model_type, hf):
    same(read(model_type, {}), read(model_type, theirs(hf, model_type, {})))


@pytest.mark.parametrize("model_type", FAMILIES)
@given(data=st.data())
def test_every_config_is_read_as_transformers_reads_it(model_type, data, hf):
    case = data.draw(cases(model_type, ARCHITECTURES[model_type][0]))
    optional = sorted(set(case.fields) - SIZES)
    left_out = data.draw(st.sets(st.sampled_from(optional)))
    fields = {name: value for name, value in case.fields.items() if name not in left_out}
    same(read(model_type, fields), read(model_type, theirs(hf, model_type, fields)))


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
# Names of older versions, and the fields of today that say the same.
OLDER = {
    "neox-rotary": (
        "gpt_neox",
        {"rotary_pct": 0.5, "rotary_emb_base": 500},
        {"rope_parameters": {"rope_theta": 500, "partial_rotary_factor": 0.5}},
    ),
    "neox-a-quarter": (
        "gpt_neox",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.25}},
    ),
    "llama-theta": ("llama", {"rope_theta": 500}, {"rope_parameters": {"rope_theta": 500}}),
    "llama-no-scaling": ("llama", {"rope_theta": 500, "rope_scaling": None}, {"rope_theta": 500}),
    "llama-linear": (
        "llama",
        {"rope_theta": 500, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500}},
    ),
    "llama3": (
        "llama",
        {"rope_theta": 5e5, "max_position_embeddings": 64, "rope_scaling": {"rope_type": "llama3"} | LLAMA3},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "original_max_position_embeddings": 64} | LLAMA3},
    ),
    "llama-both": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 7.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    ),
    "llama-yarn-beside": (
        "llama",
        {"rope_parameters": YARN | {"original_max_position_embeddings": 8}, "original_max_position_embeddings": 16},
        {"rope_parameters": YARN | {"original_max_position_embeddings": 16}},
    ),
    "llama3-beside": (
        "llama",
        {"rope_scaling": {"rope_type": "llama3"} | LLAMA3, "original_max_position_embeddings": 16},
        {"rope_parameters": {"rope_type": "llama3", "original_max_position_embeddings": 16} | LLAMA3},
    ),
    "neox-yarn-beside": (
        "gpt_neox",
        {"rope_scaling": YARN, "original_max_position_embeddings": 16, "rotary_pct": 1.0},
        {"rope_parameters": YARN | {"original_max_position_embeddings": 16, "partial_rotary_factor": 1.0}},
    ),
    "llama-linear-beside": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "original_max_position_embeddings": 16},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    ),
    "llama-yarn-null": (
        "llama",
        {"rope_parameters": YARN | {"truncate": None, "original_max_position_embeddings": 16}},
        {"rope_parameters": YARN | {"truncate": False, "original_max_position_embeddings": 16}},
    ),
    "bloom-width": ("bloom", {"n_embed": 16}, {"hidden_size": 16}),
    "bloom-counts": ("bloom", {"num_hidden_layers": 3, "num_attention_heads": 4}, {"n_layer": 3, "n_head": 4}),
}  # fmt: skip


@pytest.mark.parametrize("name", OLDER)
def test_older_names(name):
    model_type, older, newer = OLDER[name]
    fields = SMALL[model_type]
    same(read(model_type, fields | older), read(model_type, fields | newer))


@pytest.mark.parametrize("name", OLDER)
def test_older_names_are_what_transformers_takes_them_for(name, hf):
    model_type, older, _ = OLDER[name]
    fields = SMALL[model_type]
    same(read(model_type, fields | older), read(model_type, theirs(hf, model_type, fields | older)))


def test_yarn_takes_its_factor_from_the_lengths_where_it_has_none():
    rope = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32}
    fields = SMALL["llama"] | {"max_position_embeddings": 128, "rope_parameters": rope}
    positions = read("llama", fields).positions
    assert positions == Rotary(scaling=YarnScaling(factor=4.0, original_max_length=32))


ROPES = ("dynamic", "longrope", "proportional")
# What is in the space of the config classes and not in ours: the family, the fields, and what the error names.
REFUSED = {
    "gpt2-cross-attention": ("gpt2", {"add_cross_attention": True}, r"config\.json: add_cross_attention must be False, the only supported value, got True"),
    "bert-cross-attention": ("bert", {"add_cross_attention": True}, r"config\.json: add_cross_attention must be False, the only supported value, got True"),
    "bert-decoder": ("bert", {"is_decoder": True}, r"config\.json: is_decoder must be False, the only supported value, got True"),
    "bert-relative": ("bert", {"position_embedding_type": "relative_key"}, "'relative_key'"),
    "vit-pooler-width": ("vit", {"pooler_output_size": 5}, r"config\.json: pooler_output_size must be 8, the only supported value, got 5"),
    "vit-rectangle": ("vit", {"image_size": [8, 4], "patch_size": 4}, r"config\.json: image_size must be square, got \[8, 4\]"),
    "vit-rectangular-patch": ("vit", {"image_size": 8, "patch_size": [4, 2]}, r"config\.json: patch_size must be square, got \[4, 2\]"),
    "gptj-odd-rotary": ("gptj", {"rotary_dim": 3}, "dim must be an even number.*, got 3"),
    "gptj-wide-rotary": ("gptj", {"rotary_dim": 6}, "at most head_dim=4"),
    "gptj-null-rotary": ("gptj", {"rotary_dim": None}, r"config\.json: rotary_dim must be a whole number from 0 to 2147483647, got null"),
    "neox-odd-rotary": ("gpt_neox", {"rotary_pct": 0.2}, "rotary_fraction must make an even number .*, got 0.2, which makes 3"),
    "neox-no-rotary": ("gpt_neox", {"rotary_pct": 0.0}, "rotary_fraction must be above 0.*, got 0.0"),
    "llama-odd-head": ("llama", {"head_dim": 5}, r"TransformerConfig\.positions must be rotary over an even number of at most head_dim=5 dimensions, got Rotary"),
    "mixtral-too-few": ("mixtral", {"num_local_experts": 1}, r"RouterConfig\.k.* must be at most num_experts=1"),
    "mixtral-none": ("mixtral", {"num_local_experts": 0, "num_experts_per_tok": 0}, "k must be at least 1.*, got 0"),
    "mixtral-negative-loss": ("mixtral", {"router_aux_loss_coef": -0.1}, r"balance must be at least 0, got -0\.1"),
    "olmoe-clip": ("olmoe", {"clip_qkv": 8.0}, r"config\.json: clip_qkv must be None, the only supported value, got 8\.0"),
    "qwen2_moe-layers": ("qwen2_moe", {"mlp_only_layers": [0.5]}, r"mlp_only_layers must be a list of whole.*, got \[0\.5\]"),
    "qwen3_moe-step": ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be a whole number from 1.*, got 0"),
    "qwen3_moe-window": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 0}, "window must be at least 1.*, got 0"),
    "mistral-no-tokens": ("mistral", {"sliding_window": 0}, "window must be at least 1.*, got 0"),
    "mistral-text": ("mistral", {"sliding_window": "all"}, "sliding_window must be a whole number.*, got 'all'"),
    "qwen2-kinds": ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}, r"config\.json: layer_types must name one of full_attention, sliding_attention for each of 2 layers, got"),
    "qwen2-kinds-of-others": ("qwen2", {"layer_types": ["full_attention"]}, r"config\.json: layer_types must name one of full_attention, sliding_attention for each of 2 layers, got \['full_attention'\]"),
    "qwen2-no-window": ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "use_sliding_window=False"),
    "qwen2-partial-rotary": ("qwen2", {"partial_rotary_factor": 0.5}, r"config\.json: partial_rotary_factor must be 1, because Llama and related models in transformers rotate all of each head, got 0\.5"),
    "llama-partial-rotary": ("llama", {"partial_rotary_factor": 0.5}, r"config\.json: partial_rotary_factor must be 1, because Llama and related models in transformers rotate all of each head, got 0\.5"),
    "activation": ("gpt2", {"activation_function": "gelu_10"}, r"config\.json: the activation must be one of gelu, .*, got 'gelu_10'"),
    "trained-activation": ("llama", {"hidden_act": "prelu"}, r"config\.json: the activation must be one of gelu, .*, got 'prelu'"),
    "heads": ("gpt2", {"n_head": 3}, r"config\.json describes an invalid model: num_heads must divide d_model=8, got 3"),
    "key-heads": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 3}, r"config\.json describes an invalid model: AttentionConfig\.num_kv_heads must be a divisor of num_heads=4, got 3"),
    "no-heads": ("bert", {"num_attention_heads": 0}, "num_heads must be at least 1.*, got 0"),
    "text": ("gpt2", {"n_embd": "wide"}, "n_embd must be a whole number.*, got 'wide'"),
    "null": ("opt", {"hidden_size": None}, "hidden_size must be a whole number.*, got null"),
} | {f"llama-{kind}": ("llama", {"rope_scaling": {"type": kind, "factor": 2.0}}, f"'{kind}'") for kind in ROPES}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    model_type, fields, message = REFUSED[name]
    with pytest.raises(FolderError, match=message):
        read(model_type, SMALL[model_type] | fields)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_the_functions_of_these_names(name, hf):
    torch = pytest.importorskip("torch", reason="transformers' activations need PyTorch")
    x = np.linspace(-9, 9, 601, dtype=np.float32)
    expected = hf.activations.ACT2FN[name](torch.tensor(x)).numpy()
    np.testing.assert_allclose(
        OURS[ACTIVATIONS[name]](jnp.asarray(x)), expected, atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_without_a_model_type_the_class_tells_the_family(model_type):
    for architecture in ARCHITECTURES[model_type]:
        assert identify({"architectures": [architecture]}, {}) is FAMILIES[model_type]


@pytest.mark.parametrize("name", ["GPTNeoXJapaneseForCausalLM", "ViTMAEModel", "Llama4ForCausalLM", "OPTimus", "T5Model"])  # fmt: skip
def test_classes_of_other_families_are_not_taken(name):
    with pytest.raises(
        FolderError, match=f"must belong to one of gpt2, opt, bloom, gptj, .*, got {name!r}"
    ):
        identify({"architectures": [name]}, {})


def test_a_model_type_that_we_have_not_counts_more_than_a_class_that_we_have():
    with pytest.raises(FolderError, match="'mamba'"):
        identify({"model_type": "mamba", "architectures": ["LlamaForCausalLM"]}, {})


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("start", ["", "prefix", "rwtransformer."])
def test_without_either_the_tensors_tell_the_family(model_type, start):
    family = FAMILIES[model_type]
    start = family.prefix if start == "prefix" else start
    info = TensorInfo((1,), np.dtype("float32"))
    infos = {start + rule.theirs.format(7, 0): info for rule in family.trunk}
    # Llama's relatives have its names.
    named_alike = {"mistral": FAMILIES["llama"], "qwen2": FAMILIES["llama"]}
    assert identify({"architectures": None}, infos) is named_alike.get(model_type, family)
    with pytest.raises(FolderError, match="neither model_type nor architectures"):
        identify({}, {f"unknown.{name}": info for name in infos})


def test_the_spaces_are_of_all_families():
    assert SPACES.keys() == ARCHITECTURES.keys() == FAMILIES.keys()
