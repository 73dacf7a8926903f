"""BLOOM in transformers: query, key and value fused head by head."""

from typing import Any

from effscale.interop.families import decoder_heads
from effscale.interop.families.family import Family
from effscale.interop.families.fields import Field, Json
from effscale.interop.table import embedding, fused_by_head, linear, norm, rows
from effscale.models import TransformerConfig, bloom

OLDER = {
    "num_layers": "num_hidden_layers",
    "d_model": "n_embed",
    "num_heads": "num_attention_heads",
}
"""Names of the sizes in old configs; if present, they take precedence."""


def read(fields: Json) -> dict[str, Any]:
    """Return the sizes that the config has under their older names."""
    return {ours: fields[name] for ours, name in OLDER.items() if fields[name] is not None}


def has_normed_residual(config: TransformerConfig) -> bool:
    """Return whether the residual is the normalized stream."""
    return config.blocks[0].residual == "pre_normed"


BLOOM = Family(
    model_type="bloom",
    class_name="Bloom",
    make=bloom,
    fields=(
        Field("n_layer", 2, "num_layers"),
        Field("hidden_size", 64, "d_model"),
        Field("n_head", 8, "num_heads"),
        *(Field(name, None) for name in OLDER.values()),
        Field("vocab_size", 250880, "vocab_size"),
        Field(
            "apply_residual_connection_post_layernorm",
            False,
            "normed_residual",
            write=has_normed_residual,
        ),
        Field("hidden_dropout", 0.0, "dropout"),
        Field("attention_dropout", 0.0, "attention_dropout"),
        Field("layer_norm_epsilon", 1e-5, "epsilon"),
        Field("tie_word_embeddings", True),
    ),
    read=read,
    prefix="transformer.",
    trunk=rows(
        embedding("word_embeddings", "embed.tokens"),
        norm("word_embeddings_layernorm", "embed.norm"),
        norm("h.{}.input_layernorm", "attention_norm"),
        fused_by_head("h.{}.self_attention.query_key_value"),
        linear("h.{}.self_attention.dense", "attention.out"),
        norm("h.{}.post_attention_layernorm", "feed_forward_norm"),
        linear("h.{}.mlp.dense_h_to_4h", "feed_forward.up"),
        linear("h.{}.mlp.dense_4h_to_h", "feed_forward.down"),
        norm("ln_f", "final_norm"),
    ),
    heads=decoder_heads.TABLE + decoder_heads.CLASSIFIER,
    tied={"lm_head.weight": "word_embeddings.weight"},
    find_heads=decoder_heads.find,
    architecture=decoder_heads.architecture("Bloom"),
)
