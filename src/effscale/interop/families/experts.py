"""Families with experts in transformers, relatives of Llama: Mixtral, OLMoE, Qwen2-MoE and Qwen3-MoE.

Mixtral's ``router_jitter_noise``, which only matters in training, is ignored.
"""

import functools
from typing import Any

from effscale.interop.families import decoder_heads, rope
from effscale.interop.families.fields import Field, Json, Nullable, sizes
from effscale.interop.families.llama import (
    ATTENTION,
    MLP,
    head_dim,
    read_windows,
    rotary,
    unusual_head_dim,
    write_windows,
)
from effscale.interop.families.mixtures import (
    EXPERTS,
    QK_NORMS,
    Split,
    counts,
    expert_activation,
    expert_width,
    gated,
    llama_of_experts,
    mixture,
    normalized,
    of_experts,
    other_count,
)
from effscale.interop.foreign import Fields
from effscale.interop.table import matrix, norm, rows
from effscale.models import MLPConfig, TransformerConfig
from effscale.moe.layer import MoEConfig

MIXTRAL = mixture(
    "Mixtral",
    model_type="mixtral",
    fields=(
        *sizes(32, 4096, 32, 32000),
        Nullable("num_key_value_heads", 8, "num_kv_heads"),
        # transformers does not derive it for YaRN.
        Field("head_dim", None, "head_dim", write=head_dim),
        expert_width("intermediate_size", 14336, "d_ff"),
        *counts("num_local_experts", 8, 2, 0.001),
        Field("num_experts", None),
        Field("sliding_window", None, "window"),
        Field("attention_dropout", 0.0, "attention_dropout"),
        expert_activation(),
        Field("rms_norm_eps", 1e-5, "epsilon"),
        Field("tie_word_embeddings", False),
    ),
    read=lambda fields: (
        rotary(fields, base=1e6, longest=131072) | other_count(fields, "num_experts")
    ),
    trunk=rows(
        ATTENTION,
        matrix("layers.{}.block_sparse_moe.gate", "feed_forward.router.logits"),
        gated(
            "layers.{}.block_sparse_moe.experts.{}",
            "feed_forward.experts",
            {"w1": "gate", "w2": "down", "w3": "up"},
        ),
        norm("norm", "final_norm"),
    ),
    in_memory={"layers.{}.block_sparse_moe": "layers.{}.mlp"},
    split=lambda tensors: Split(tensors, gate="w1", up="w3", down="w2"),
)
OLMOE = mixture(
    "Olmoe",
    model_type="olmoe",
    make=functools.partial(llama_of_experts, qk_norm="all"),
    fields=(
        *sizes(16, 2048, 16, 50304),
        Field("num_key_value_heads", None, "num_kv_heads"),
        expert_width("intermediate_size", 2048, "d_ff"),
        *counts("num_experts", 64, 8, 0.01),
        Field("num_local_experts", None),
        of_experts("norm_topk_prob", False, "normalized", normalized),
        Field("attention_bias", False, "bias"),
        Field("attention_dropout", 0.0, "attention_dropout"),
        expert_activation(),
        Field("rms_norm_eps", 1e-5, "epsilon"),
        Field("tie_word_embeddings", False),
    ),
    only={"clip_qkv": None},
    read=lambda fields: rotary(fields, longest=4096) | other_count(fields, "num_local_experts"),
    trunk=rows(ATTENTION, QK_NORMS, EXPERTS, norm("norm", "final_norm")),
    architecture=decoder_heads.architecture("Olmoe", lacks=decoder_heads.CLASSES),
)


def read_layers(fields: Json) -> tuple[bool, ...] | None:
    """Return which layers have experts; None means all."""
    typed = Fields("config.json", fields)
    step = typed.whole("decoder_sparse_step", least=1)
    dense = set(typed.wholes("mlp_only_layers", []))
    layers = range(fields["num_hidden_layers"])
    if not fields["num_experts"]:
        dense |= {*layers}
    if step == 1 and not dense:
        return None
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in layers)


def write_layers(config: TransformerConfig) -> dict[str, Any]:
    """Write which layers have experts, as a step if possible, and the width of layers without experts."""
    parts = [layer.feed_forward for layer in config.layers]
    sparse = [isinstance(part, MoEConfig) for part in parts]
    widths = [part.d_ff for part in parts if isinstance(part, MLPConfig)]
    fields = {"intermediate_size": widths[0]} if widths else {}
    for step in range(1, len(parts) + 1):
        if sparse == [(layer + 1) % step == 0 for layer in range(len(parts))]:
            return fields | {"decoder_sparse_step": step, "mlp_only_layers": []}
    dense = [layer for layer, has in enumerate(sparse) if not has]
    return fields | {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def read_qwen2(fields: Json) -> dict[str, Any]:
    """Read rotary positions, windows of every second layer up to ``max_window_layers``, and which layers have experts."""
    last = fields["max_window_layers"]
    window = read_windows(fields, lambda layer: layer % 2 == 0 and layer < last)
    return _read(fields) | {"window": window}


def write_qwen2(config: TransformerConfig) -> dict[str, Any]:
    """Write what ``read_qwen2`` reads."""
    return _write(config) | write_windows(config)


def read_qwen3(fields: Json) -> dict[str, Any]:
    """Read rotary positions, one window for all layers, which layers have experts, and their number under its other name."""
    window = fields["sliding_window"] if fields["use_sliding_window"] else None
    return _read(fields) | {"window": window} | other_count(fields, "num_local_experts")


def write_qwen3(config: TransformerConfig) -> dict[str, Any]:
    """Write what ``read_qwen3`` reads."""
    window = config.layers[0].attention.window
    fields = {} if window is None else {"sliding_window": window}
    return _write(config) | fields | {"use_sliding_window": window is not None}


def shared_width(moe: MoEConfig) -> int:
    """Return the inner width of the shared expert.

    Raises:
        ValueError: There is no shared expert.
    """
    if not isinstance(moe.shared, MLPConfig):
        raise ValueError(f"the shared expert of the config must be an MLP, got {moe.shared!r}")
    return moe.shared.d_ff


def _read(fields: Json) -> dict[str, Any]:
    return rotary(fields, longest=32768) | {
        "head_dim": fields["head_dim"],
        "d_ff": fields["intermediate_size"],
        "sparse": read_layers(fields),
    }


def _write(config: TransformerConfig) -> dict[str, Any]:
    return rope.write(config) | unusual_head_dim(config) | write_layers(config)


COMMON = (
    Field("num_hidden_layers", 24, "num_layers"),
    Field("hidden_size", 2048, "d_model"),
    Field("head_dim", None),
    Field("vocab_size", 151936, "vocab_size"),
    Field("use_sliding_window", False),
    Nullable("sliding_window", 4096),
    Field("attention_dropout", 0.0, "attention_dropout"),
    Field("decoder_sparse_step", 1),
    of_experts("norm_topk_prob", False, "normalized", normalized),
    expert_activation(),
    Field("rms_norm_eps", 1e-6, "epsilon"),
    Field("tie_word_embeddings", False),
)
SHARED = rows(
    gated("layers.{}.mlp.shared_expert", "feed_forward.shared"),
    matrix("layers.{}.mlp.shared_expert_gate", "feed_forward.coefficient"),
)

QWEN2_MOE = mixture(
    "Qwen2Moe",
    model_type="qwen2_moe",
    make=functools.partial(llama_of_experts, out_bias=False),
    fields=(
        *COMMON,
        *counts("num_experts", 60, 4, 0.001),
        Field("num_attention_heads", 16, "num_heads"),
        Nullable("num_key_value_heads", 16, "num_kv_heads"),
        Field("intermediate_size", 5632),
        expert_width("moe_intermediate_size", 1408, "expert_d_ff"),
        of_experts("shared_expert_intermediate_size", 5632, "shared_d_ff", shared_width),
        Field("max_window_layers", 28),
        Field("qkv_bias", True, "bias"),
    ),
    read=read_qwen2,
    write=write_qwen2,
    trunk=rows(ATTENTION, EXPERTS, SHARED, MLP, norm("norm", "final_norm")),
)

QWEN3_MOE = mixture(
    "Qwen3Moe",
    model_type="qwen3_moe",
    make=functools.partial(llama_of_experts, qk_norm="head"),
    fields=(
        *COMMON,
        *counts("num_experts", 128, 8, 0.001),
        Field("num_local_experts", None),
        Field("num_attention_heads", 32, "num_heads"),
        Nullable("num_key_value_heads", 4, "num_kv_heads"),
        Field("intermediate_size", 6144),
        expert_width("moe_intermediate_size", 768, "expert_d_ff"),
        Field("attention_bias", False, "bias"),
    ),
    read=read_qwen3,
    write=write_qwen3,
    prefixes={"Qwen3MoeForQuestionAnswering": "transformer."},
    trunk=rows(ATTENTION, QK_NORMS, EXPERTS, MLP, norm("norm", "final_norm")),
)
