"""Published sizes: built without memory, counted, and compared with what was published."""

import jax
import pytest

from effscale.models import PRESETS, abstract_model, num_params, preset

# Exact numbers of the released checkpoints (without tied duplicates and buffers).
RELEASED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "bloom-560m": 559_214_592,
    "bloom-1b1": 1_065_314_304,
    "bloom-1b7": 1_722_408_960,
    "bloom-3b": 3_002_557_440,
    "bloom-7b1": 7_069_016_064,
    "bloom": 176_247_271_424,
    "gpt-j-6b": 6_050_882_784,
    "gpt-neox-20b": 20_554_567_680,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "smollm2-135m": 134_515_008,
    "bert-base": 109_482_240,
    "bert-large": 335_141_888,
    "vit-base": 86_567_656,
    "vit-large": 304_326_632,
    "vit-huge": 632_045_800,
}
# Where the papers give round numbers only.
ROUND = {
    "gpt3-760m": 760e6, "gpt3-1.3b": 1.3e9, "gpt3-2.7b": 2.7e9, "gpt3-6.7b": 6.7e9, "gpt3-13b": 13e9,
    "gpt3-175b": 175e9, "gpt3-125m": 125e6, "gpt3-350m": 356e6, "opt-2.7b": 2.65e9, "opt-6.7b": 6.7e9, "opt-13b": 13e9,
    "opt-30b": 30e9, "opt-66b": 66e9, "opt-175b": 175e9, "llama-33b": 32.5e9, "llama-65b": 65.2e9, "llama2-7b": 6.74e9,
    "llama2-13b": 13.0e9, "llama3-70b": 70.6e9, "vit-tiny": 5.7e6, "vit-small": 22e6,
}  # fmt: skip
VOCABULARY = {
    "gpt": 50257,
    "opt": 50272,
    "bloom": 250_880,
    "llama-": 32000,
    "llama2": 32000,
    "llama3": 128_256,
    "bert": 30522,
}


def test_every_preset_is_compared():
    assert set(RELEASED) | set(ROUND) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_number_of_parameters(name):
    found = num_params(preset(name))
    if name in RELEASED:
        assert found == RELEASED[name]
    else:
        assert found == pytest.approx(ROUND[name], rel=0.02)


def test_the_largest_costs_no_memory_and_runs_abstractly():
    for name in ("gpt3-175b", "bloom", "llama3-70b", "vit-huge"):
        model = abstract_model(preset(name))
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model))
        config = model.config
        if name.startswith("vit"):
            inputs, output = jax.ShapeDtypeStruct((2, 224, 224, 3), "float32"), (2, 1000)
        else:
            inputs, output = (
                jax.ShapeDtypeStruct((2, 64), "int32"),
                (2, 64, config.inputs.vocab_size),
            )
        out = jax.eval_shape(lambda m, x: m(x), model, inputs)
        assert (out["classes"] if name.startswith("vit") else out).shape == output


@pytest.mark.parametrize("name", PRESETS)
def test_dimensions(name):
    config = preset(name)
    block = config.blocks[0]
    if name not in ("gpt-j-6b", "gpt-neox-20b"):
        for prefix, size in VOCABULARY.items():
            if name.startswith(prefix):
                assert config.inputs.vocab_size == size
    if name.startswith("pythia"):
        padded = {
            "pythia-6.9b": 50432,
            "pythia-12b": 50688,
        }  # to multiples that differ with tensor parallelism
        assert config.inputs.vocab_size == padded.get(name, 50304)
        assert config.positions.dim == block.attention.width(config.d_model) // 4
    if name.startswith(("opt", "gpt3")):
        assert config.max_length == 2048
    if name.startswith("llama"):
        assert block.attention.width(config.d_model) == 128
        assert config.positions.base == (500_000 if name.startswith("llama3") else 10_000)
    assert block.feed_forward.d_ff >= 2 * config.d_model
    assert config.d_model % block.attention.num_heads == 0


def test_unknown_name():
    with pytest.raises(ValueError, match=r"no preset 'gtp2-xl': did you mean 'gpt2-xl'"):
        preset("gtp2-xl")
    with pytest.raises(ValueError, match=r"no preset 'bloom-560': did you mean 'bloom-560m'"):
        preset("bloom-560")


def theirs(hf, name):
    """The configuration that transformers has for a preset: its own defaults but for the size."""
    config = preset(name)
    attention = config.blocks[0].attention
    layers, width, heads, d_ff = (
        config.num_layers,
        config.d_model,
        attention.num_heads,
        config.blocks[0].feed_forward.d_ff,
    )
    gpt = {"n_layer": layers, "n_embd": width, "n_head": heads}
    usual = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    vocab = {} if name.startswith("vit") else {"vocab_size": config.inputs.vocab_size}
    family = name.split("-")[0]
    if family in ("gpt2", "gpt3"):
        return hf.GPT2LMHeadModel, hf.GPT2Config(**gpt, n_positions=config.max_length)
    if family == "opt":
        other = (
            {"word_embed_proj_dim": 512, "do_layer_norm_before": False}
            if name == "opt-350m"
            else {"word_embed_proj_dim": width}
        )
        return hf.OPTForCausalLM, hf.OPTConfig(**usual, ffn_dim=d_ff, **other)
    if family == "bloom":
        return hf.BloomForCausalLM, hf.BloomConfig(n_layer=layers, hidden_size=width, n_head=heads)
    if name == "gpt-j-6b":
        return hf.GPTJForCausalLM, hf.GPTJConfig()
    if name == "gpt-neox-20b":
        return hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig()
    if family == "pythia":
        return hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**usual, **vocab, intermediate_size=d_ff)
    if family in ("llama", "llama2", "llama3", "smollm2"):
        rest = {
            "tie_word_embeddings": family == "smollm2",
            "num_key_value_heads": attention.kv_heads,
            "intermediate_size": d_ff,
        }
        return hf.LlamaForCausalLM, hf.LlamaConfig(**usual, **vocab, **rest, pad_token_id=None)
    if family == "bert":
        return hf.BertModel, hf.BertConfig(**usual, intermediate_size=d_ff)
    patch = config.inputs.patch_size
    return hf.ViTForImageClassification, hf.ViTConfig(
        **usual, intermediate_size=d_ff, patch_size=patch, num_labels=1000
    )


@pytest.mark.parametrize("name", ["gpt2-xl", "opt-350m", "opt-1.3b", "bloom-560m", "gpt-j-6b", "gpt-neox-20b", "pythia-1b", "llama3-8b", "smollm2-135m", "bert-large", "vit-huge"])  # fmt: skip
def test_transformers_counts_the_same(name):
    torch = pytest.importorskip("torch", reason="the oracle is PyTorch")
    hf = pytest.importorskip("transformers", reason="the oracle is transformers")
    kind, config = theirs(hf, name)
    with torch.device("meta"):
        model = kind(config)
    assert sum(p.numel() for p in model.parameters()) == num_params(preset(name))
