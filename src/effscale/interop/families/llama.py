"""Llama, Mistral and Qwen2 in transformers, and Llama in GGUF files under llama.cpp's names.

Mistral is a Llama with sliding windows. Qwen2 has biases in query, key and value, and windows in some layers. Llama's
``pretraining_tp``, an order of sums, is ignored.
"""

import functools
from collections.abc import Callable
from typing import Any

from effscale.interop.families import decoder_heads, rope
from effscale.interop.families.family import Family
from effscale.interop.families.fields import Field, Json, Nullable, activation, sizes
from effscale.interop.foreign import Fields, shown
from effscale.interop.table import Rule, embedding, linear, norm, projections, rows
from effscale.interop.tensors import FolderError
from effscale.models import TransformerConfig, llama


def rotary(fields: Json, *, base: float = 10000.0, longest: int = 2048) -> dict[str, Any]:
    """Return rotary positions over all of each head; ``base`` and ``longest`` are the family's defaults."""
    found = rope.parameters(
        fields, fraction="partial_rotary_factor", default=1.0, base=base, longest=longest
    )
    if found["partial_rotary_factor"] != 1:
        raise FolderError(
            f"config.json: partial_rotary_factor must be 1, because Llama and related models in transformers rotate all of each "
            f"head, got {found['partial_rotary_factor']}"
        )
    return rope.arguments(found)


def head_dim(config: TransformerConfig) -> int:
    """Return the width of a head."""
    return config.blocks[0].attention.width(config.d_model)


def unusual_head_dim(config: TransformerConfig) -> dict[str, int]:
    """Return the field of the head width, if it does not follow from the number of heads."""
    width = head_dim(config)
    usual = width * config.blocks[0].attention.num_heads == config.d_model
    return {} if usual else {"head_dim": width}


ATTENTION = rows(
    embedding("embed_tokens", "embed.tokens"),
    norm("layers.{}.input_layernorm", "attention_norm"),
    projections("layers.{}.self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
    norm("layers.{}.post_attention_layernorm", "feed_forward_norm"),
)
MLP = rows(
    linear("layers.{}.mlp.gate_proj", "feed_forward.gate"),
    linear("layers.{}.mlp.up_proj", "feed_forward.up"),
    linear("layers.{}.mlp.down_proj", "feed_forward.down"),
)

OTHERS = (
    Field("attention_dropout", 0.0, "attention_dropout"),
    activation("hidden_act", "silu"),
    Field("rms_norm_eps", 1e-6, "epsilon"),
    Field("tie_word_embeddings", False),
)


def relative(class_name: str, **options: Any) -> Family:
    """Return a family with the names of Llama's tensors, from the fields of ``Family`` that differ from Llama's."""
    usual: dict[str, Any] = {
        "make": llama,
        "write": rope.write,
        "prefix": "model.",
        "trunk": rows(ATTENTION, MLP, norm("norm", "final_norm")),
        "heads": decoder_heads.TABLE + linear("score", "heads.token_classes.dense"),
        "tied": {"lm_head.weight": "embed_tokens.weight"},
        "ignored": (r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"rotary_emb\.inv_freq"),
        "find_heads": decoder_heads.find,
        "architecture": decoder_heads.architecture(class_name),
    }
    return Family(class_name=class_name, **(usual | options))


LLAMA = relative(
    "Llama",
    model_type="llama",
    fields=(
        *sizes(32, 4096, 32, 32000),
        Field("num_key_value_heads", None, "num_kv_heads"),
        Field("head_dim", None, "head_dim", write=head_dim),
        Field("intermediate_size", 11008, "d_ff"),
        Field("attention_bias", False, "bias"),
        Field("mlp_bias", False, "mlp_bias"),
        *OTHERS,
    ),
    read=rotary,
    prefixes={"LlamaForQuestionAnswering": "transformer."},
)
MISTRAL = relative(
    "Mistral",
    model_type="mistral",
    fields=(
        *sizes(32, 4096, 32, 32000),
        Nullable("num_key_value_heads", 8, "num_kv_heads"),
        Field("head_dim", None, "head_dim", write=head_dim),
        Field("intermediate_size", 14336, "d_ff"),
        Nullable("sliding_window", 4096, "window"),
        *OTHERS,
    ),
    read=functools.partial(rotary, longest=131072),
)


# The values of `layer_types`.
KINDS = {"full_attention": False, "sliding_attention": True}


def read_windows(fields: Json, has_one: Callable[[int], bool]) -> tuple[int | None, ...] | None:
    """Return the window of each layer, or None if no layer has one. Without ``layer_types``, layers have one as ``has_one`` says."""
    typed = Fields("config.json", fields)
    width = typed.whole("sliding_window", None, least=0) if fields["use_sliding_window"] else None
    kinds = typed.strings("layer_types", None)
    if kinds is None and not width:
        return None
    have = [has_one(layer) for layer in range(fields["num_hidden_layers"])]
    if kinds is not None:
        if len(kinds) != len(have) or not set(kinds) <= set(KINDS):
            raise FolderError(
                f"config.json: layer_types must name one of {', '.join(KINDS)} for each of {len(have)} layers, got {shown(kinds)}"
            )
        have = [KINDS[kind] for kind in kinds]
        if any(have) and not width:
            raise FolderError(
                "config.json: layer_types has sliding_attention, but use_sliding_window="
                f"{fields['use_sliding_window']} and sliding_window={width} define no window"
            )
    return tuple(width if one else None for one in have)


def write_windows(config: TransformerConfig) -> dict[str, Any]:
    """Return the fields for a config.

    Raises:
        ValueError: Layers have windows of different widths.
    """
    found = [layer.attention.window for layer in config.layers]
    widths = sorted({width for width in found if width is not None})
    if len(widths) > 1:
        raise ValueError(
            f"the windows of all layers must have the same width in a Qwen model, got {widths}"
        )
    full, sliding = KINDS
    fields: dict[str, Any] = {
        "use_sliding_window": bool(widths),
        "layer_types": [full if width is None else sliding for width in found],
    }
    return fields | ({"sliding_window": widths[0]} if widths else {})


def read_qwen2(fields: Json) -> dict[str, Any]:
    """Return rotary positions, and windows from layer ``max_window_layers`` on."""
    window = read_windows(fields, lambda layer: layer >= fields["max_window_layers"])
    return rotary(fields, longest=32768) | {"window": window, "head_dim": fields["head_dim"]}


def write_qwen2(config: TransformerConfig) -> dict[str, Any]:
    """Return the fields of rotary positions, windows, and head width."""
    return rope.write(config) | write_windows(config) | unusual_head_dim(config)


QWEN2 = relative(
    "Qwen2",
    model_type="qwen2",
    make=functools.partial(llama, bias=True, out_bias=False),
    fields=(
        *sizes(32, 4096, 32, 151936),
        Nullable("num_key_value_heads", 32, "num_kv_heads"),
        Field("head_dim", None),  # written only if it does not follow from the other fields
        Field("intermediate_size", 22016, "d_ff"),
        Field("use_sliding_window", False),
        Nullable("sliding_window", 4096),
        Field("max_window_layers", 28),
        *OTHERS,
    ),
    read=read_qwen2,
    write=write_qwen2,
    prefixes={"Qwen2ForQuestionAnswering": "transformer."},
)

# llama.cpp rotates adjacent pairs, so its query and key rows are those of Llama in another order.
GGUF_TABLE = rows(
    embedding("token_embd", "embed.tokens"),
    norm("blk.{}.attn_norm", "attention_norm"),
    (
        Rule("blk.{}.attn_q.weight", "attention.query.kernel", "(h d t) i -> i (h t d)"),
        Rule("blk.{}.attn_k.weight", "attention.key.kernel", "(g d t) i -> i (g t d)"),
    ),
    linear("blk.{}.attn_v", "attention.value"),
    linear("blk.{}.attn_output", "attention.out"),
    norm("blk.{}.ffn_norm", "feed_forward_norm"),
    linear("blk.{}.ffn_gate", "feed_forward.gate"),
    linear("blk.{}.ffn_up", "feed_forward.up"),
    linear("blk.{}.ffn_down", "feed_forward.down"),
    norm("output_norm", "final_norm"),
    linear("output", "heads.lm.project"),
)
