"""Mistral in transformers: a Llama with sliding windows."""

import functools

from effscale.interop.families import decoder_heads, rope
from effscale.interop.families.family import Family
from effscale.interop.families.fields import Field, Nullable, activation
from effscale.interop.families.llama import (
    ATTENTION,
    BUFFERS,
    HEADS,
    MLP,
    head_dim,
    rotary,
)
from effscale.interop.table import norm, rows
from effscale.models import llama

MISTRAL = Family(
    model_type="mistral",
    class_name="Mistral",
    make=llama,
    fields=(
        Field("num_hidden_layers", 32, "num_layers"),
        Field("hidden_size", 4096, "d_model"),
        Field("num_attention_heads", 32, "num_heads"),
        Nullable("num_key_value_heads", 8, "num_kv_heads"),
        Field("head_dim", None, "head_dim", write=head_dim),
        Field("intermediate_size", 14336, "d_ff"),
        Field("vocab_size", 32000, "vocab_size"),
        Nullable("sliding_window", 4096, "window"),
        Field("attention_dropout", 0.0, "attention_dropout"),
        activation("hidden_act", "silu"),
        Field("rms_norm_eps", 1e-6, "epsilon"),
        Field("tie_word_embeddings", False),
    ),
    read=functools.partial(rotary, longest=131072),
    write=rope.write,
    prefix="model.",
    trunk=rows(ATTENTION, MLP, norm("norm", "final_norm")),
    heads=HEADS,
    tied={"lm_head.weight": "embed_tokens.weight"},
    ignored=BUFFERS,
    find_heads=decoder_heads.find,
    architecture=decoder_heads.architecture("Mistral"),
)
