"""OLMoE in transformers: a relative of Llama with experts, and norms of queries and keys over all heads."""

from typing import Any

from effscale.interop.families.family import Heads
from effscale.interop.families.fields import Field, Json
from effscale.interop.families.llama import ATTENTION, rotary
from effscale.interop.families.mixtures import (
    EXPERTS,
    QK_NORMS,
    counts,
    expert_activation,
    expert_width,
    mixture,
    normalized,
    of_experts,
    with_mixtures,
)
from effscale.interop.table import norm, rows
from effscale.models import LMHead, TransformerConfig, llama


def olmoe(
    *, num_experts: int, k: int, normalized: bool, aux_loss: float, **dense: Any
) -> TransformerConfig:
    """Return the config of an OLMoE; ``dense`` are the arguments of ``effscale.models.llama``."""
    config = llama(qk_norm="all", **dense)
    expert: Any = config.blocks[0].feed_forward
    experts = {"num_experts": num_experts, "k": k, "expert": expert}
    return with_mixtures(config, **experts, normalized=normalized, aux_loss=aux_loss)


def read(fields: Json) -> dict[str, Any]:
    """Read rotary positions, and the number of experts under its other name."""
    found, other = rotary(fields, longest=4096), fields["num_local_experts"]
    return found if other is None else found | {"num_experts": other}


def architecture(heads: Heads) -> str:
    """Return the class of transformers with these heads; it has none for classification."""
    if not heads:
        return "OlmoeModel"
    if len(heads) == 1 and isinstance(heads[0], LMHead) and heads[0].name == "lm":
        return "OlmoeForCausalLM"
    raise ValueError(
        f"transformers has no OLMoE class with the heads {[head.name for head in heads]}"
    )


OLMOE = mixture(
    "Olmoe",
    model_type="olmoe",
    make=olmoe,
    fields=(
        Field("num_hidden_layers", 16, "num_layers"),
        Field("hidden_size", 2048, "d_model"),
        Field("num_attention_heads", 16, "num_heads"),
        Field("num_key_value_heads", None, "num_kv_heads"),
        expert_width("intermediate_size", 2048, "d_ff"),
        *counts("num_experts", 64, 8, 0.01),
        Field("num_local_experts", None),
        of_experts("norm_topk_prob", False, "normalized", normalized),
        Field("vocab_size", 50304, "vocab_size"),
        Field("attention_bias", False, "bias"),
        Field("attention_dropout", 0.0, "attention_dropout"),
        expert_activation(),
        Field("rms_norm_eps", 1e-5, "epsilon"),
        Field("tie_word_embeddings", False),
    ),
    only={"clip_qkv": None},
    read=read,
    trunk=rows(ATTENTION, QK_NORMS, EXPERTS, norm("norm", "final_norm")),
    architecture=architecture,
)
