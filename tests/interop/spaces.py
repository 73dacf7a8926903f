"""The config space of each family as hypothesis strategies: whatever transformers' config classes have, in tiny sizes.

A :class:`Case` is a ``config.json`` and the class in transformers that it is for; it needs neither torch nor transformers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from effscale.interop.families import FAMILIES
from effscale.interop.families.family import Family
from effscale.interop.families.fields import ACTIVATIONS
from effscale.interop.tensors import TensorInfo
from effscale.models import TransformerConfig

tuple(FAMILIES.values())  # all are imported now, and not amid a draw
PAD = 1  # every language model's padding token; real tokens begin after it
MAX_LENGTH = 32

DECODERS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Model", "GPT2ForSequenceClassification", "GPT2ForTokenClassification",
             "GPT2ForQuestionAnswering"),
    "opt": ("OPTForCausalLM", "OPTModel", "OPTForSequenceClassification", "OPTForQuestionAnswering"),
    "bloom": ("BloomForCausalLM", "BloomModel", "BloomForSequenceClassification", "BloomForTokenClassification",
              "BloomForQuestionAnswering"),
    "gptj": ("GPTJForCausalLM", "GPTJModel", "GPTJForSequenceClassification", "GPTJForQuestionAnswering"),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXModel", "GPTNeoXForSequenceClassification",
                 "GPTNeoXForTokenClassification", "GPTNeoXForQuestionAnswering"),
    "llama": ("LlamaForCausalLM", "LlamaModel", "LlamaForSequenceClassification", "LlamaForTokenClassification",
              "LlamaForQuestionAnswering"),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeModel", "Qwen2MoeForSequenceClassification",
                  "Qwen2MoeForTokenClassification", "Qwen2MoeForQuestionAnswering"),
    "olmoe": ("OlmoeForCausalLM", "OlmoeModel"),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeModel", "Qwen3MoeForSequenceClassification",
                  "Qwen3MoeForTokenClassification", "Qwen3MoeForQuestionAnswering"),
    "mixtral": ("MixtralForCausalLM", "MixtralModel", "MixtralForSequenceClassification",
                "MixtralForTokenClassification", "MixtralForQuestionAnswering"),
    "mistral": ("MistralForCausalLM", "MistralModel", "MistralForSequenceClassification",
                "MistralForTokenClassification", "MistralForQuestionAnswering"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Model", "Qwen2ForSequenceClassification", "Qwen2ForTokenClassification",
              "Qwen2ForQuestionAnswering"),
}  # fmt: skip
RELATIVES = ("mistral", "qwen2", "mixtral", "qwen2_moe", "olmoe", "qwen3_moe")
LLAMAS = ("llama", *RELATIVES)
ENCODERS = {
    "bert": ("BertModel", "BertForPreTraining", "BertForMaskedLM", "BertForNextSentencePrediction",
             "BertForSequenceClassification", "BertForMultipleChoice", "BertForTokenClassification",
             "BertForQuestionAnswering"),
    "vit": ("ViTModel", "ViTForImageClassification"),
}  # fmt: skip
ARCHITECTURES = DECODERS | ENCODERS
EVERY_CLASS = [(family, name) for family, names in ARCHITECTURES.items() for name in names]
# The heads of Llama's relatives are Llama's; the last of their classes is the one whose tensors may have a prefix of its own.
CLASSES = [
    (family, name)
    for family, name in EVERY_CLASS
    if family not in RELATIVES or name in (ARCHITECTURES[family][0], ARCHITECTURES[family][-1])
]

LABELS = {
    "ForMultipleChoice": 1
}  # of classes with a number of their own; where there are none, configs say 2
WITH_POOLER = ("ForPreTraining", "ForNextSentencePrediction", "ForSequenceClassification",
               "ForMultipleChoice")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of transformers.

    Attributes:
        model_type: Its family.
        architecture: Its class.
        fields: Of its ``config.json``.
        pooler: Whether it has a pooler, which no field tells.
        labels: How many classes its classifier has.
    """

    model_type: str
    architecture: str
    fields: dict[str, Any]
    pooler: bool
    labels: int

    @property
    def family(self) -> Family:
        """Our description of its family."""
        return FAMILIES[self.model_type]

    @property
    def json(self) -> dict[str, Any]:
        """What ``config.json`` holds."""
        labels = [f"LABEL_{i}" for i in range(self.labels)]
        return self.fields | {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            "id2label": {str(i): name for i, name in enumerate(labels)},
            "label2id": {name: i for i, name in enumerate(labels)},
        }

    @property
    def config(self) -> TransformerConfig:
        """Our config, as the loader finds it from the tensors that such a model has beside its trunk."""
        shapes = dict.fromkeys(self._head_tensors(), (self.labels, 1))
        if self.pooler:
            shapes["pooler.dense.weight"] = (1, 1)
        infos = {name: TensorInfo(shape, np.dtype("float32")) for name, shape in shapes.items()}
        fields = self.json | {"add_pooling_layer": self.pooler}
        return self.family.config(fields, infos)

    def _head_tensors(self) -> tuple[str, ...]:
        name = self.architecture.removeprefix(self.family.class_name)
        classifier = "classifier" if self.model_type in ENCODERS else "score"
        mlm, nsp = "cls.predictions.transform.dense.weight", "cls.seq_relationship.weight"
        each_token = "score" if self.model_type in LLAMAS else "classifier"
        return {
            "ForSequenceClassification": (f"{classifier}.weight",),
            "ForMultipleChoice": ("classifier.weight",),
            "ForImageClassification": ("classifier.weight",),
            "ForTokenClassification": (f"{each_token}.weight", f"{each_token}.bias"),
            "ForQuestionAnswering": ("qa_outputs.weight",),
            "ForPreTraining": (mlm, nsp),
            "ForMaskedLM": (mlm,),
            "ForNextSentencePrediction": (nsp,),
        }.get(name, ())


rates = st.sampled_from([0.0, 0.1, 0.25, 0])
epsilons = st.sampled_from([1e-5, 1e-12, 1e-6, 1e-3])
activations = st.sampled_from(list(ACTIVATIONS))
layers = st.integers(1, 3)
heads = st.integers(1, 5)
head_dims = st.integers(5, 9)
usually = st.sampled_from([True, False])  # the first is what hypothesis begins with
widths = st.integers(5, 40)
vocabularies = st.integers(31, 60)
lengths = st.integers(MAX_LENGTH, 40)


@st.composite
def gpt2(draw) -> dict[str, Any]:
    """The flags of the scores included."""
    num_heads = draw(heads)
    return {
        "n_layer": draw(layers),
        "n_head": num_heads,
        "n_embd": num_heads * draw(head_dims),
        "n_inner": draw(st.none() | widths),
        "n_positions": draw(lengths),
        "activation_function": draw(activations),
        "layer_norm_epsilon": draw(epsilons),
        "scale_attn_weights": draw(usually),
        "scale_attn_by_inverse_layer_idx": draw(st.booleans()),
        "reorder_and_upcast_attn": draw(st.booleans()),
        "resid_pdrop": draw(rates),
        "embd_pdrop": draw(rates),
        "attn_pdrop": draw(rates),
    }


@st.composite
def opt(draw) -> dict[str, Any]:
    """Pre-norm and post-norm, with or without biases, affine norms, a final norm, an embedding of its own width."""
    num_heads = draw(heads)
    width = num_heads * draw(head_dims)
    return {
        "num_hidden_layers": draw(layers),
        "num_attention_heads": num_heads,
        "hidden_size": width,
        "ffn_dim": draw(widths),
        "max_position_embeddings": draw(lengths),
        "word_embed_proj_dim": draw(st.sampled_from([width, None]) | st.integers(3, 30)),
        "do_layer_norm_before": draw(usually),
        "_remove_final_layer_norm": draw(st.booleans()),
        "enable_bias": draw(usually),
        "layer_norm_elementwise_affine": draw(usually),
        "activation_function": draw(activations),
        "dropout": draw(rates),
        "attention_dropout": draw(rates),
    }


@st.composite
def bloom(draw) -> dict[str, Any]:
    """Any number of heads: ALiBi's slopes differ where it is no power of two."""
    num_heads = draw(st.integers(1, 7))
    return {
        "n_layer": draw(layers),
        "n_head": num_heads,
        "hidden_size": num_heads * draw(head_dims),
        "apply_residual_connection_post_layernorm": draw(st.booleans()),
        "layer_norm_epsilon": draw(epsilons),
        "hidden_dropout": draw(rates),
        "attention_dropout": draw(rates),
    }


@st.composite
def gptj(draw) -> dict[str, Any]:
    """Rotary over any even part of a head."""
    num_heads, head_dim = draw(heads), draw(head_dims)
    return {
        "n_layer": draw(layers),
        "n_head": num_heads,
        "n_embd": num_heads * head_dim,
        "rotary_dim": 2 * draw(st.integers(1, head_dim // 2)),
        "n_inner": draw(st.none() | widths),
        "n_positions": draw(lengths),
        "activation_function": draw(activations),
        "layer_norm_epsilon": draw(epsilons),
        "resid_pdrop": draw(rates),
        "embd_pdrop": draw(rates),
        "attn_pdrop": draw(rates),
    }


@st.composite
def gpt_neox(draw) -> dict[str, Any]:
    """Parallel and sequential, rotary over any even part of a head, scaled or not."""
    num_heads, head_dim = draw(heads), draw(head_dims)
    dim = 2 * draw(st.integers(1, head_dim // 2))
    # transformers rounds the product with the width of a head down.
    fraction = dim / head_dim if dim == head_dim else draw(st.floats(0.01, 0.99)) + dim
    fraction = 1.0 if dim == head_dim else fraction / head_dim
    return {
        "num_hidden_layers": draw(layers),
        "num_attention_heads": num_heads,
        "hidden_size": num_heads * head_dim,
        "intermediate_size": draw(widths),
        "max_position_embeddings": draw(lengths),
        "rope_parameters": draw(ropes()) | {"partial_rotary_factor": fraction},
        "use_parallel_residual": draw(usually),
        "attention_bias": draw(usually),
        "hidden_act": draw(activations),
        "layer_norm_eps": draw(epsilons),
        "hidden_dropout": draw(rates),
        "attention_dropout": draw(rates),
    }


@st.composite
def llama(draw) -> dict[str, Any]:
    """Grouped queries, heads of any even width, biases, scaled rotary."""
    num_heads, head_dim = draw(st.integers(1, 6)), 2 * draw(st.integers(2, 5))
    divisors = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
    width = num_heads * draw(st.integers(5, 9))
    fits = width // num_heads % 2 == 0
    return {
        "num_hidden_layers": draw(layers),
        "num_attention_heads": num_heads,
        "num_key_value_heads": draw(st.none() | st.sampled_from(divisors)),
        "head_dim": draw(st.sampled_from([None, head_dim])) if fits else head_dim,
        "hidden_size": width,
        "intermediate_size": draw(widths),
        "max_position_embeddings": draw(lengths),
        "rope_parameters": draw(ropes()),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "attention_dropout": draw(rates),
        "hidden_act": draw(activations),
        "rms_norm_eps": draw(epsilons),
        "pretraining_tp": draw(st.sampled_from([1, 2])),
    }


@st.composite
def relative(draw, *, with_head_dim: bool = True) -> dict[str, Any]:
    """What Llama's relatives have in common with it."""
    num_heads, head_dim = draw(st.integers(1, 6)), 2 * draw(st.integers(2, 5))
    divisors = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
    width = num_heads * (draw(st.integers(5, 9)) if with_head_dim else head_dim)
    return {
        "num_hidden_layers": draw(st.integers(1, 4)),
        "num_attention_heads": num_heads,
        "num_key_value_heads": draw(st.sampled_from(divisors)),
        **({"head_dim": head_dim} if with_head_dim else {}),
        "hidden_size": width,
        "intermediate_size": draw(widths),
        "max_position_embeddings": draw(lengths),
        "rope_parameters": draw(ropes()),
        "attention_dropout": draw(rates),
        "hidden_act": draw(activations),
        "rms_norm_eps": draw(epsilons),
    }


@st.composite
def mistral(draw) -> dict[str, Any]:
    """Windows that are narrower and wider than the texts; without any it would be a Llama.

    None of a single token: transformers' cache then keeps all tokens (its last ``-1 + 1``), and generates others than without a cache.
    """
    return draw(relative()) | {"sliding_window": draw(st.sampled_from([4, 2, 3, 40]))}


@st.composite
def qwen2(draw) -> dict[str, Any]:
    """Windows in some layers, in all or in none, told in either way."""
    fields = draw(relative(with_head_dim=draw(usually))) | {
        "use_sliding_window": draw(st.booleans()),
        "sliding_window": draw(st.sampled_from([3, 40])),
        "max_window_layers": draw(st.integers(0, 4)),
    }
    if fields["use_sliding_window"] and draw(st.booleans()):
        kinds = st.sampled_from(["full_attention", "sliding_attention"])
        count = fields["num_hidden_layers"]
        fields["layer_types"] = draw(st.lists(kinds, min_size=count, max_size=count))
    return fields


@st.composite
def experts(draw, name: str = "num_experts") -> dict[str, Any]:
    """From one expert to more than a token takes, of which it takes one to all."""
    count = draw(st.integers(1, 6))
    return {
        name: count,
        "num_experts_per_tok": draw(st.integers(1, min(count, 4))),
        "router_aux_loss_coef": draw(st.sampled_from([0.001, 0.0, 0.02, 0.1 + 0.2])),
    }


@st.composite
def mixtral(draw) -> dict[str, Any]:
    """With windows and without."""
    windows = {"sliding_window": draw(st.sampled_from([None, 3]))}
    return draw(relative()) | draw(experts("num_local_experts")) | windows


@st.composite
def olmoe(draw) -> dict[str, Any]:
    """Norms over all heads, with fewer key heads, too."""
    bias, normalized = {"attention_bias": draw(st.booleans())}, draw(st.booleans())
    fields = draw(relative(with_head_dim=False)) | draw(experts())
    return fields | bias | {"norm_topk_prob": normalized}


@st.composite
def qwen_moe(draw) -> dict[str, Any]:
    """Experts in all layers, in every second one, and not in some."""
    fields = draw(relative(with_head_dim=draw(usually))) | draw(experts())
    layers = range(fields["num_hidden_layers"])
    step, dense = draw(st.sampled_from([1, 2])), draw(st.lists(st.sampled_from(layers), max_size=2))
    if all(layer in dense or (layer + 1) % step for layer in layers):
        step, dense = 1, []  # it would be a model without experts
    return fields | {
        "moe_intermediate_size": draw(widths),
        "norm_topk_prob": draw(st.booleans()),
        "decoder_sparse_step": step,
        "mlp_only_layers": dense,
        "use_sliding_window": draw(st.booleans()),
        "sliding_window": draw(st.sampled_from([3, 40])),
    }


@st.composite
def qwen2_moe(draw) -> dict[str, Any]:
    """A shared expert, and windows of every second layer up to one."""
    return draw(qwen_moe()) | {
        "shared_expert_intermediate_size": draw(widths),
        "qkv_bias": draw(usually),
        "max_window_layers": draw(st.integers(0, 4)),
    }


@st.composite
def qwen3_moe(draw) -> dict[str, Any]:
    """Norms of each head."""
    return draw(qwen_moe()) | {"attention_bias": draw(st.booleans())}


@st.composite
def ropes(draw) -> dict[str, Any]:
    """``rope_parameters`` of the four kinds."""
    kind = draw(st.sampled_from(["default", "linear", "llama3", "yarn"]))
    found: dict[str, Any] = {
        "rope_type": kind,
        "rope_theta": draw(st.sampled_from([10000.0, 10.0, 500000])),
    }
    if kind != "default":
        found["factor"] = draw(st.sampled_from([2.0, 1.0, 1.5, 8]))
    if kind in ("llama3", "yarn"):
        # Short, so that all three parts of the ramp are met by heads as narrow as these.
        found["original_max_position_embeddings"] = draw(st.integers(4, 64))
    if kind == "llama3":
        low = draw(st.sampled_from([1.0, 0.25, 2]))
        found |= {"low_freq_factor": low, "high_freq_factor": low * draw(st.sampled_from([4, 1.5]))}
    if kind == "yarn":
        optional = {
            "beta_fast": st.sampled_from([32, 4.0]),
            "beta_slow": st.sampled_from([1, 0.5]),
            "attention_factor": st.sampled_from([0.8, 1.3]),
            "mscale": st.sampled_from([1.0, 0.7]),
            "mscale_all_dim": st.sampled_from([1.0, 0.4]),
            "truncate": st.booleans(),
        }
        found |= draw(st.fixed_dictionaries({}, optional=optional))
    return found


@st.composite
def bert(draw) -> dict[str, Any]:
    """Any number of kinds of token."""
    num_heads = draw(heads)
    return {
        "num_hidden_layers": draw(layers),
        "num_attention_heads": num_heads,
        "hidden_size": num_heads * draw(head_dims),
        "intermediate_size": draw(widths),
        "max_position_embeddings": draw(lengths),
        "type_vocab_size": draw(st.integers(1, 3)),
        "hidden_act": draw(activations),
        "layer_norm_eps": draw(epsilons),
        "hidden_dropout_prob": draw(rates),
        "attention_probs_dropout_prob": draw(rates),
        "classifier_dropout": draw(st.none() | rates),
    }


@st.composite
def vit(draw) -> dict[str, Any]:
    """Any square patch and number of channels; the sizes as a number or a pair."""
    num_heads, patch = draw(heads), draw(st.integers(1, 4))
    size = patch * draw(st.integers(1, 3))
    hidden = num_heads * draw(head_dims)
    return {
        "num_hidden_layers": draw(layers),
        "num_attention_heads": num_heads,
        "hidden_size": hidden,
        "intermediate_size": draw(widths),
        "image_size": draw(st.sampled_from([size, [size, size]])),
        "patch_size": draw(st.sampled_from([patch, [patch, patch]])),
        "num_channels": draw(st.integers(1, 4)),
        "qkv_bias": draw(usually),
        "hidden_act": draw(activations),
        "layer_norm_eps": draw(epsilons),
        "hidden_dropout_prob": draw(rates),
        "attention_probs_dropout_prob": draw(rates),
        "pooler_output_size": draw(st.sampled_from([None, hidden])),
        "pooler_act": draw(activations),
    }


SPACES: dict[str, Callable[[], st.SearchStrategy[dict[str, Any]]]] = {
    "gpt2": gpt2,
    "opt": opt,
    "bloom": bloom,
    "gptj": gptj,
    "gpt_neox": gpt_neox,
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
    "olmoe": olmoe,
    "qwen3_moe": qwen3_moe,
    "bert": bert,
    "vit": vit,
}


@st.composite
def cases(draw, model_type: str, architecture: str | None = None) -> Case:
    """A model of a family: of a class of transformers, or of any that the family has.

    Args:
        draw: Hypothesis's.
        model_type: The family.
        architecture: The class.
    """
    if architecture is None:
        architecture = draw(st.sampled_from(ARCHITECTURES[model_type]))
    name = architecture.removeprefix(FAMILIES[model_type].class_name)
    fields = draw(SPACES[model_type]())
    if model_type != "vit":
        special = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None}
        fields |= {"vocab_size": draw(vocabularies)} | special
        # Elsewhere the field has no effect, and does not come back.
        if name in ("LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForPreTraining"):
            fields["tie_word_embeddings"] = draw(usually)
    has_pooler = model_type == "bert" and name in WITH_POOLER
    if model_type in ENCODERS and name == "Model":
        has_pooler = draw(st.booleans())
    classifier = name.endswith("Classification")
    labels = draw(st.sampled_from([3, 1, 2])) if classifier else LABELS.get(name, 2)
    return Case(model_type, architecture, fields, has_pooler, labels)


SIZES = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
# The least that describes a model of each family; what else there is, is as by default.
SMALL: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 8, "n_layer": 2, "n_head": 2},
    "opt": {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2},
    "bloom": {"hidden_size": 8, "n_layer": 2, "n_head": 2},
    "gptj": {"n_embd": 8, "n_layer": 2, "n_head": 2, "rotary_dim": 4},
    "gpt_neox": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "llama": {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2},
    "mistral": SIZES,
    "qwen2": SIZES,
    "mixtral": SIZES,
    "qwen2_moe": SIZES,
    "olmoe": SIZES,
    "qwen3_moe": SIZES,
    "bert": {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2},
    "vit": {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2},
}
WITH_EXPERTS = {
    "intermediate_size": 12,
    "moe_intermediate_size": 6,
    "num_experts": 5,
    "num_experts_per_tok": 2,
}
# Sizes that are large by default.
FEW: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": 32},
    "opt": {"ffn_dim": 12, "max_position_embeddings": 32},
    "bloom": {},
    "gptj": {"n_positions": 32},
    "gpt_neox": {"intermediate_size": 12},
    "llama": {"intermediate_size": 12},
    "mistral": {"intermediate_size": 12},
    "qwen2": {"intermediate_size": 12},
    "mixtral": {"intermediate_size": 12, "num_local_experts": 3},
    "qwen2_moe": WITH_EXPERTS | {"shared_expert_intermediate_size": 10},
    "olmoe": {"intermediate_size": 6, "num_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": WITH_EXPERTS,
    "bert": {"intermediate_size": 12, "max_position_embeddings": 32},
    "vit": {"intermediate_size": 12, "image_size": 4, "patch_size": 2},
}


def example(model_type: str, architecture: str, **fields: Any) -> Case:
    """A tiny model that is as by default in all else."""
    small = (
        SMALL[model_type] | FEW[model_type] | ({} if model_type == "vit" else {"vocab_size": 31})
    )
    name = architecture.removeprefix(FAMILIES[model_type].class_name)
    has_pooler = model_type in ENCODERS and name in (*WITH_POOLER, "Model")
    labels = 3 if name.endswith("Classification") else LABELS.get(name, 2)
    return Case(model_type, architecture, small | fields, has_pooler, labels)
