"""Mixtral in transformers: a Mistral whose layers have experts. ``router_jitter_noise``, which only matters in training, is ignored."""

from typing import Any

from effscale.interop.families.fields import Field, Json, Nullable
from effscale.interop.families.llama import ATTENTION, head_dim, rotary
from effscale.interop.families.mixtures import (
    Split,
    counts,
    expert_activation,
    expert_width,
    mixture,
    with_mixtures,
)
from effscale.interop.table import linear, norm, rows
from effscale.models import TransformerConfig, llama


def mixtral(*, num_experts: int, k: int, aux_loss: float, **dense: Any) -> TransformerConfig:
    """Return the config of a Mixtral; ``dense`` are the arguments of ``effscale.models.llama``."""
    config = llama(**dense)
    expert: Any = config.blocks[0].feed_forward
    experts = {"num_experts": num_experts, "k": k, "expert": expert}
    return with_mixtures(config, **experts, normalized=True, aux_loss=aux_loss)


def read(fields: Json) -> dict[str, Any]:
    """Read rotary positions, and the number of experts under its other name."""
    found, other = rotary(fields, base=1e6, longest=131072), fields["num_experts"]
    return found if other is None else found | {"num_experts": other}


MIXTRAL = mixture(
    "Mixtral",
    model_type="mixtral",
    make=mixtral,
    fields=(
        Field("num_hidden_layers", 32, "num_layers"),
        Field("hidden_size", 4096, "d_model"),
        Field("num_attention_heads", 32, "num_heads"),
        Nullable("num_key_value_heads", 8, "num_kv_heads"),
        # transformers does not derive it for YaRN.
        Field("head_dim", None, "head_dim", write=head_dim),
        expert_width("intermediate_size", 14336, "d_ff"),
        *counts("num_local_experts", 8, 2, 0.001),
        Field("num_experts", None),
        Field("vocab_size", 32000, "vocab_size"),
        Field("sliding_window", None, "window"),
        Field("attention_dropout", 0.0, "attention_dropout"),
        expert_activation(),
        Field("rms_norm_eps", 1e-5, "epsilon"),
        Field("tie_word_embeddings", False),
    ),
    read=read,
    trunk=rows(
        ATTENTION,
        linear("layers.{}.block_sparse_moe.gate", "feed_forward.router.logits")[:1],
        linear("layers.{}.block_sparse_moe.experts.{}.w1", "feed_forward.experts.gate")[:1],
        linear("layers.{}.block_sparse_moe.experts.{}.w2", "feed_forward.experts.down")[:1],
        linear("layers.{}.block_sparse_moe.experts.{}.w3", "feed_forward.experts.up")[:1],
        norm("norm", "final_norm"),
    ),
    in_memory={"layers.{}.block_sparse_moe": "layers.{}.mlp"},
    split=lambda tensors: Split(tensors, gate="w1", up="w3", down="w2"),
)
