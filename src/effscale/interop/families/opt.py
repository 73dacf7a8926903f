"""OPT in transformers."""

from typing import Any

from effscale.interop.families import decoder_heads
from effscale.interop.families.family import (
    Family,
    Heads,
    Json,
    activation,
    common,
    part,
    their_activation,
    with_heads,
)
from effscale.interop.table import embedding, linear, norm, rows
from effscale.models import LearnedPositions, MLPConfig, TransformerConfig, opt


def from_hf(fields: Json, heads: Heads) -> TransformerConfig:
    """Our config; ``layerdrop`` is a regularizer of training that is left out."""
    width = fields["word_embed_proj_dim"]
    config = opt(
        num_layers=fields["num_hidden_layers"],
        d_model=fields["hidden_size"],
        num_heads=fields["num_attention_heads"],
        d_ff=fields["ffn_dim"],
        vocab_size=fields["vocab_size"],
        max_length=fields["max_position_embeddings"],
        d_embed=None if width == fields["hidden_size"] else width,
        post_norm=not fields["do_layer_norm_before"],
        final_norm=not fields["_remove_final_layer_norm"],
        bias=fields["enable_bias"],
        norm_affine=fields["layer_norm_elementwise_affine"],
        activation=activation(fields["activation_function"]),
        dropout=fields["dropout"],
        attention_dropout=fields["attention_dropout"],
    )
    return with_heads(config, heads)


def to_hf(config: TransformerConfig) -> dict[str, Any]:
    """The fields of ``config.json``."""
    block = config.blocks[0]
    mlp = part(block.feed_forward, MLPConfig)
    positions = part(config.positions, LearnedPositions)
    pre_norm = block.residual == "pre"
    return common(config) | {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.d_model,
        "num_attention_heads": block.attention.num_heads,
        "ffn_dim": mlp.d_ff,
        "max_position_embeddings": positions.num,
        "word_embed_proj_dim": config.hidden_width,
        "do_layer_norm_before": pre_norm,
        "_remove_final_layer_norm": pre_norm and config.final_norm is None,
        "enable_bias": block.attention.bias,
        "layer_norm_elementwise_affine": block.norm.scale,
        "activation_function": their_activation(mlp.activation),
        "dropout": block.dropout,
        "attention_dropout": block.attention.dropout,
    }


OPT = Family(
    model_type="opt",
    class_name="OPT",
    prefix="model.",
    trunk=rows(
        embedding("decoder.embed_tokens", "embed.tokens"),
        embedding("decoder.embed_positions", "embed.positions"),
        linear("decoder.project_in", "embed.into"),
        linear("decoder.project_out", "embed.out_of"),
        norm("decoder.layers.{}.self_attn_layer_norm", "attention_norm"),
        linear("decoder.layers.{}.self_attn.q_proj", "attention.query"),
        linear("decoder.layers.{}.self_attn.k_proj", "attention.key"),
        linear("decoder.layers.{}.self_attn.v_proj", "attention.value"),
        linear("decoder.layers.{}.self_attn.out_proj", "attention.out"),
        norm("decoder.layers.{}.final_layer_norm", "feed_forward_norm"),
        linear("decoder.layers.{}.fc1", "feed_forward.up"),
        linear("decoder.layers.{}.fc2", "feed_forward.down"),
        norm("decoder.final_layer_norm", "final_norm"),
    ),
    heads=decoder_heads.TABLE,
    tied={"lm_head.weight": "decoder.embed_tokens.weight"},
    defaults={
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "ffn_dim": 3072,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": None,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "activation_function": "relu",
        "dropout": 0.1,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
    },
    from_hf=from_hf,
    to_hf=to_hf,
    find_heads=decoder_heads.find,
    architecture=decoder_heads.architecture("OPT", token_classes=False),
)
