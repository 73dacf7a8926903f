"""GPT-2 in transformers: ``Conv1D`` layers, fused query, key and value."""

from typing import Any

from effscale.interop.families import decoder_heads
from effscale.interop.families.family import (
    Family,
    Heads,
    Json,
    activation,
    common,
    part,
    refuse,
    their_activation,
    with_heads,
)
from effscale.interop.table import conv1d, embedding, fused_conv1d, norm, rows
from effscale.models import LearnedPositions, MLPConfig, TransformerConfig, gpt2


def from_hf(fields: Json, heads: Heads) -> TransformerConfig:
    """Our config."""
    refuse(fields, add_cross_attention=False)
    config = gpt2(
        num_layers=fields["n_layer"],
        d_model=fields["n_embd"],
        num_heads=fields["n_head"],
        d_ff=fields["n_inner"],
        vocab_size=fields["vocab_size"],
        max_length=fields["n_positions"],
        dropout=fields["resid_pdrop"],
        attention_dropout=fields["attn_pdrop"],
        embed_dropout=fields["embd_pdrop"],
        activation=activation(fields["activation_function"]),
        epsilon=fields["layer_norm_epsilon"],
        scale_attention=fields["scale_attn_weights"],
        scale_by_layer=fields["scale_attn_by_inverse_layer_idx"],
    )
    return with_heads(config, heads)


def to_hf(config: TransformerConfig) -> dict[str, Any]:
    """The fields of ``config.json``."""
    first, last = config.blocks[0], config.blocks[-1]
    mlp = part(first.feed_forward, MLPConfig)
    positions = part(config.positions, LearnedPositions)
    by_layer = config.num_layers > 1 and first.attention.scale != last.attention.scale
    # With one layer its number divides by 1.
    scaled = first.attention.scale in (None, first.attention.width(config.d_model) ** -0.5)
    return common(config) | {
        "n_layer": config.num_layers,
        "n_embd": config.d_model,
        "n_head": first.attention.num_heads,
        "n_inner": None if mlp.d_ff == 4 * config.d_model else mlp.d_ff,
        "n_positions": positions.num,
        "resid_pdrop": first.dropout,
        "attn_pdrop": first.attention.dropout,
        "embd_pdrop": config.inputs.dropout,
        "activation_function": their_activation(mlp.activation),
        "layer_norm_epsilon": first.norm.epsilon,
        "scale_attn_weights": scaled,
        "scale_attn_by_inverse_layer_idx": by_layer,
    }


GPT2 = Family(
    model_type="gpt2",
    class_name="GPT2",
    prefix="transformer.",
    trunk=rows(
        embedding("wte", "embed.tokens"),
        embedding("wpe", "embed.positions"),
        norm("h.{}.ln_1", "attention_norm"),
        fused_conv1d("h.{}.attn.c_attn"),
        conv1d("h.{}.attn.c_proj", "attention.out"),
        norm("h.{}.ln_2", "feed_forward_norm"),
        conv1d("h.{}.mlp.c_fc", "feed_forward.up"),
        conv1d("h.{}.mlp.c_proj", "feed_forward.down"),
        norm("ln_f", "final_norm"),
    ),
    heads=decoder_heads.TABLE + decoder_heads.CLASSIFIER,
    tied={"lm_head.weight": "wte.weight"},
    ignored=(r"h\.\d+\.attn\.(masked_)?bias",),
    defaults={
        "n_layer": 12,
        "n_embd": 768,
        "n_head": 12,
        "n_inner": None,
        "n_positions": 1024,
        "vocab_size": 50257,
        "resid_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
    },
    from_hf=from_hf,
    to_hf=to_hf,
    find_heads=decoder_heads.find,
    architecture=decoder_heads.architecture("GPT2", lm="LMHeadModel"),
)
