"""Qwen2-MoE and Qwen3-MoE in transformers: relatives of Llama with experts in all or some layers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from effscale.interop.families import rope, windows
from effscale.interop.families.fields import Field, Json, Nullable
from effscale.interop.families.llama import (
    ATTENTION,
    MLP,
    rotary,
    unusual_head_dim,
)
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
from effscale.interop.foreign import Fields
from effscale.interop.table import linear, norm, rows
from effscale.models import MLPConfig, TransformerConfig, llama
from effscale.moe.layer import MoEConfig


def qwen_moe(
    *,
    num_experts: int,
    k: int,
    expert_d_ff: int,
    normalized: bool,
    aux_loss: float,
    sparse: Sequence[bool] | None = None,
    shared_d_ff: int | None = None,
    **dense: Any,
) -> TransformerConfig:
    """Return the config of a Qwen with experts.

    ``dense`` are the arguments of ``effscale.models.llama``, with the width of layers without experts.
    """
    config = llama(**dense)
    mlp: Any = config.blocks[0].feed_forward
    return with_mixtures(
        config,
        num_experts=num_experts,
        k=k,
        expert=dataclasses.replace(mlp, d_ff=expert_d_ff),
        normalized=normalized,
        aux_loss=aux_loss,
        sparse=sparse,
        shared=None if shared_d_ff is None else dataclasses.replace(mlp, d_ff=shared_d_ff),
    )


def qwen2_moe(*, bias: bool, **options: Any) -> TransformerConfig:
    """Return the config of a Qwen2-MoE, with biases only of query, key and value."""
    return qwen_moe(bias=bias, out_bias=False, **options)


def qwen3_moe(**options: Any) -> TransformerConfig:
    """Return the config of a Qwen3-MoE, with norms of queries and keys."""
    return qwen_moe(qk_norm="head", **options)


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
    window = windows.read(fields, lambda layer: layer % 2 == 0 and layer < last)
    return _read(fields) | {"window": window}


def write_qwen2(config: TransformerConfig) -> dict[str, Any]:
    """Write what ``read_qwen2`` reads."""
    return _write(config) | windows.write(config)


def read_qwen3(fields: Json) -> dict[str, Any]:
    """Read rotary positions, one window for all layers, which layers have experts, and their number under its other name."""
    window = fields["sliding_window"] if fields["use_sliding_window"] else None
    other = fields["num_local_experts"]
    found = _read(fields) | {"window": window}
    return found if other is None else found | {"num_experts": other}


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
    linear("layers.{}.mlp.shared_expert.gate_proj", "feed_forward.shared.gate")[:1],
    linear("layers.{}.mlp.shared_expert.up_proj", "feed_forward.shared.up")[:1],
    linear("layers.{}.mlp.shared_expert.down_proj", "feed_forward.shared.down")[:1],
    linear("layers.{}.mlp.shared_expert_gate", "feed_forward.coefficient")[:1],
)

QWEN2_MOE = mixture(
    "Qwen2Moe",
    model_type="qwen2_moe",
    make=qwen2_moe,
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
    make=qwen3_moe,
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
