"""GPT-NeoX and Pythia in transformers: query, key and value fused head by head."""

from typing import Any

from effscale.interop.families import decoder_heads, rope
from effscale.interop.families.family import Family
from effscale.interop.families.fields import Field, Json, activation
from effscale.interop.table import embedding, fused_by_head, linear, norm, rows
from effscale.models import TransformerConfig, neox


def read(fields: Json) -> dict[str, Any]:
    """Return the rotary positions."""
    rotary = rope.parameters(fields, theta="rotary_emb_base", fraction="rotary_pct", default=0.25)
    return rope.arguments(rotary) | {"rotary_fraction": rotary["partial_rotary_factor"]}


def write(config: TransformerConfig) -> dict[str, Any]:
    """Return the fields of the rotary positions, with the fraction of a head that rotates, whose default is a quarter."""
    fields = rope.write(config)
    fields["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
    return fields


def is_parallel(config: TransformerConfig) -> bool:
    """Return whether both parts of a layer read the same stream."""
    return config.blocks[0].residual == "parallel"


NEOX = Family(
    model_type="gpt_neox",
    class_name="GPTNeoX",
    make=neox,
    fields=(
        Field("num_hidden_layers", 44, "num_layers"),
        Field("hidden_size", 6144, "d_model"),
        Field("num_attention_heads", 64, "num_heads"),
        Field("intermediate_size", 24576, "d_ff"),
        Field("vocab_size", 50432, "vocab_size"),
        Field("use_parallel_residual", True, "parallel", write=is_parallel),
        Field("attention_bias", True, "bias"),
        Field("hidden_dropout", 0.0, "dropout"),
        Field("attention_dropout", 0.0, "attention_dropout"),
        Field("classifier_dropout", 0.1),
        activation("hidden_act", "gelu"),
        Field("layer_norm_eps", 1e-5, "epsilon"),
        Field("tie_word_embeddings", False),
    ),
    read=read,
    write=write,
    prefix="gpt_neox.",
    trunk=rows(
        embedding("embed_in", "embed.tokens"),
        norm("layers.{}.input_layernorm", "attention_norm"),
        fused_by_head("layers.{}.attention.query_key_value"),
        linear("layers.{}.attention.dense", "attention.out"),
        norm("layers.{}.post_attention_layernorm", "feed_forward_norm"),
        linear("layers.{}.mlp.dense_h_to_4h", "feed_forward.up"),
        linear("layers.{}.mlp.dense_4h_to_h", "feed_forward.down"),
        norm("final_layer_norm", "final_norm"),
    ),
    # The head is `embed_out` in files and, from transformers 5 on, `lm_head` in memory.
    heads=rows(
        linear("embed_out", "heads.lm.project"),
        tuple(r for r in decoder_heads.TABLE if not r.theirs.startswith("lm_head")),
        decoder_heads.CLASSIFIER,
    ),
    tied={"embed_out.weight": "embed_in.weight"},
    ignored=(
        r"layers\.\d+\.attention\.(masked_)?bias",
        r"layers\.\d+\.attention\.rotary_emb\.inv_freq",
        r"rotary_emb\.inv_freq",
    ),
    in_memory={"embed_out": "lm_head"},
    find_heads=decoder_heads.find,
    architecture=decoder_heads.architecture("GPTNeoX"),
)
