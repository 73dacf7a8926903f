"""PEFT as the oracle of adapters: tiny models of every family, its adapters of them, and what both compute."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import safetensors.numpy
import torch
import transformers as hf

from effscale.models import LoRA, map_weights

hf.utils.logging.disable_progress_bar()

LAYERS = {"n_layer": 3, "n_embd": 16, "n_head": 4}
LONG = {
    "num_hidden_layers": 3,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
TOKENS = {"vocab_size": 29, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", LAYERS | TOKENS | {"n_positions": 12}),
    "opt": (
        "OPTForCausalLM",
        TOKENS
        | {"num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 4, "ffn_dim": 24}
        | {"max_position_embeddings": 12, "word_embed_proj_dim": 8},
    ),
    "bloom": ("BloomForCausalLM", TOKENS | {"n_layer": 3, "hidden_size": 16, "n_head": 4}),
    "gptj": ("GPTJForCausalLM", LAYERS | TOKENS | {"rotary_dim": 2}),
    "gpt_neox": ("GPTNeoXForCausalLM", TOKENS | LONG | {"num_attention_heads": 2}),
    "llama": ("LlamaForCausalLM", TOKENS | LONG | {"num_key_value_heads": 2}),
    "mistral": ("MistralForCausalLM", TOKENS | LONG | {"num_key_value_heads": 2, "sliding_window": 3}),
    "qwen2": ("Qwen2ForCausalLM", TOKENS | LONG | {"num_key_value_heads": 2}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        TOKENS | LONG | {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [1],
                         "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12},
    ),
    "bert": ("BertForMaskedLM", TOKENS | LONG | {"max_position_embeddings": 12}),
    "vit": ("ViTForImageClassification", LONG | {"image_size": 8, "patch_size": 4, "num_labels": 5}),
}  # fmt: skip
run = jax.jit(lambda model, inputs: model(inputs))


def torch_base(family, **changes):
    """A model of transformers, with biases and norms off their initial values."""
    architecture, fields = FAMILIES[family]
    config = hf.CONFIG_MAPPING[family](**fields | changes)
    torch.manual_seed(7)
    model = getattr(hf, architecture)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
        if family == "bert":  # one bias, though transformers holds two where the head is not tied
            model.cls.predictions.decoder.bias.copy_(model.cls.predictions.bias)
    return model


def adapter_of_peft(model, folder, *, spread=0.3, **options):
    """Gives a torch model pairs of random numbers and saves them."""
    with warnings.catch_warnings():
        # It warns of every Conv1D that is one, of embeddings among the targets, and of a field of transformers.
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if ".lora_" in name:
                    parameter.copy_(spread * torch.randn(parameter.shape))
        adapted.save_pretrained(folder)
    return adapted


def loaded_by_peft(model, folder):
    """What PEFT makes of a folder, if it has nothing to say about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        # Where a model mixes Conv1D and Linear layers no value of fan_in_fan_out is right for both.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True` and a tied")
        adapted = peft.PeftModel.from_pretrained(model, folder).eval()
        result = adapted.load_adapter(folder, "again")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora" in key]
    return adapted


def inputs_of(family):
    """Two rows of tokens, or two images."""
    random = np.random.default_rng(5)
    if family == "vit":
        return random.normal(size=(2, 8, 8, 3)).astype(np.float32)
    return random.integers(1, 29, (2, 9)).astype(np.int32)


def torch_logits(family, model):
    """What a torch model makes of them."""
    inputs = inputs_of(family)
    given = (
        {"pixel_values": torch.tensor(inputs.transpose(0, 3, 1, 2))}
        if family == "vit"
        else {"input_ids": torch.tensor(inputs).long()}
    )
    with torch.no_grad():
        return model(**given).logits.float().numpy()


def our_logits(family, model):
    """What a model of ours makes of them."""
    out = run(model, inputs_of(family))
    return np.asarray(
        out[{"vit": "classes", "bert": "mlm"}[family]] if isinstance(out, dict) else out
    )


def same(ours, theirs):
    """Fails unless logits agree."""
    error = np.abs(ours - theirs).max()
    assert error < 1e-4
    assert error < 1e-5 * np.abs(theirs).max()


def trained(model, seed=0):
    """The model with random numbers in the B of its pairs, which are zero as made."""
    random = np.random.default_rng(seed)
    noise = lambda w: LoRA(
        w.base, w.a, jnp.asarray(0.3 * random.normal(size=w.b.shape), w.b.dtype), w.scale
    )
    return map_weights(model, lambda w: noise(w) if isinstance(w, LoRA) else w, lambda path: True)


def tensors_in(folder):
    """An adapter's tensors."""
    return safetensors.numpy.load_file(folder / "adapter_model.safetensors")


def config_in(folder):
    """An adapter's config."""
    return json.loads((folder / "adapter_config.json").read_text())


def identical(first, second):
    """Fails unless two adapters have the same bits."""
    a, b = tensors_in(first), tensors_in(second)
    assert sorted(a) == sorted(b)
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape)
        assert a[name].tobytes() == b[name].tobytes(), name


def bits(model):
    """The bytes of all arrays of a model."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(model)]
