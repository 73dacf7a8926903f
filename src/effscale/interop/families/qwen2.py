"""Qwen2 in transformers: a Llama with biases in query, key and value, and windows in some layers."""

import functools
from typing import Any

from effscale.interop.families import decoder_heads, rope, windows
from effscale.interop.families.family import Family
from effscale.interop.families.fields import Field, Json, Nullable, activation
from effscale.interop.families.llama import ATTENTION, BUFFERS, HEADS, MLP, rotary, unusual_head_dim
from effscale.interop.table import norm, rows
from effscale.models import TransformerConfig, llama


def read(fields: Json) -> dict[str, Any]:
    """Return rotary positions, and windows from layer ``max_window_layers`` on."""
    window = windows.read(fields, lambda layer: layer >= fields["max_window_layers"])
    return rotary(fields, longest=32768) | {"window": window, "head_dim": fields["head_dim"]}


def write(config: TransformerConfig) -> dict[str, Any]:
    """Return the fields of rotary positions, windows, and head width."""
    return rope.write(config) | windows.write(config) | unusual_head_dim(config)


QWEN2 = Family(
    model_type="qwen2",
    class_name="Qwen2",
    make=functools.partial(llama, bias=True, out_bias=False),
    fields=(
        Field("num_hidden_layers", 32, "num_layers"),
        Field("hidden_size", 4096, "d_model"),
        Field("num_attention_heads", 32, "num_heads"),
        Nullable("num_key_value_heads", 32, "num_kv_heads"),
        Field("head_dim", None),  # written only if it does not follow from the other fields
        Field("intermediate_size", 22016, "d_ff"),
        Field("vocab_size", 151936, "vocab_size"),
        Field("use_sliding_window", False),
        Nullable("sliding_window", 4096),
        Field("max_window_layers", 28),
        Field("attention_dropout", 0.0, "attention_dropout"),
        activation("hidden_act", "silu"),
        Field("rms_norm_eps", 1e-6, "epsilon"),
        Field("tie_word_embeddings", False),
    ),
    read=read,
    write=write,
    prefix="model.",
    prefixes={"Qwen2ForQuestionAnswering": "transformer."},
    trunk=rows(ATTENTION, MLP, norm("norm", "final_norm")),
    heads=HEADS,
    tied={"lm_head.weight": "embed_tokens.weight"},
    ignored=BUFFERS,
    find_heads=decoder_heads.find,
    architecture=decoder_heads.architecture("Qwen2"),
)
