"""BLOOM in transformers: query, key and value fused head by head."""

from typing import Any

from effscale.interop.families import decoder_heads
from effscale.interop.families.family import Family, Heads, Json, common, with_heads
from effscale.interop.table import embedding, fused_by_head, linear, norm, rows
from effscale.models import TransformerConfig, bloom


def from_hf(fields: Json, heads: Heads) -> TransformerConfig:
    """Our config; configs of old have other names for the sizes."""
    config = bloom(
        num_layers=_older(fields, "num_hidden_layers", "n_layer"),
        d_model=_older(fields, "n_embed", "hidden_size"),
        num_heads=_older(fields, "num_attention_heads", "n_head"),
        vocab_size=fields["vocab_size"],
        normed_residual=fields["apply_residual_connection_post_layernorm"],
        dropout=fields["hidden_dropout"],
        attention_dropout=fields["attention_dropout"],
        epsilon=fields["layer_norm_epsilon"],
    )
    return with_heads(config, heads)


def _older(fields: Json, older: str, name: str) -> int:
    return fields[name] if fields[older] is None else fields[older]


def to_hf(config: TransformerConfig) -> dict[str, Any]:
    """The fields of ``config.json``."""
    block = config.blocks[0]
    return common(config) | {
        "n_layer": config.num_layers,
        "hidden_size": config.d_model,
        "n_head": block.attention.num_heads,
        "apply_residual_connection_post_layernorm": block.residual == "pre_normed",
        "hidden_dropout": block.dropout,
        "attention_dropout": block.attention.dropout,
        "layer_norm_epsilon": block.norm.epsilon,
    }


BLOOM = Family(
    model_type="bloom",
    class_name="Bloom",
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
    defaults={
        "n_layer": 2,
        "hidden_size": 64,
        "n_head": 8,
        "num_hidden_layers": None,
        "n_embed": None,
        "num_attention_heads": None,
        "vocab_size": 250880,
        "apply_residual_connection_post_layernorm": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    from_hf=from_hf,
    to_hf=to_hf,
    find_heads=decoder_heads.find,
    architecture=decoder_heads.architecture("Bloom"),
)
