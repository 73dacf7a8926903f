"""GPT-J in transformers."""

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
from effscale.interop.table import Rule, embedding, linear, norm, rows
from effscale.interop.tensors import FolderError
from effscale.models import MLPConfig, Rotary, TransformerConfig, gptj


def from_hf(fields: Json, heads: Heads) -> TransformerConfig:
    """Our config."""
    if fields["rotary_dim"] is None:
        raise FolderError("config.json has rotary_dim=null, with which transformers' GPT-J fails")
    config = gptj(
        num_layers=fields["n_layer"],
        d_model=fields["n_embd"],
        num_heads=fields["n_head"],
        rotary_dim=fields["rotary_dim"],
        d_ff=fields["n_inner"],
        vocab_size=fields["vocab_size"],
        dropout=fields["resid_pdrop"],
        attention_dropout=fields["attn_pdrop"],
        embed_dropout=fields["embd_pdrop"],
        activation=activation(fields["activation_function"]),
        epsilon=fields["layer_norm_epsilon"],
    )
    return with_heads(config, heads)


def to_hf(config: TransformerConfig) -> dict[str, Any]:
    """The fields of ``config.json``."""
    block = config.blocks[0]
    mlp = part(block.feed_forward, MLPConfig)
    positions = part(config.positions, Rotary)
    return common(config) | {
        "n_layer": config.num_layers,
        "n_embd": config.d_model,
        "n_head": block.attention.num_heads,
        "rotary_dim": positions.dim or block.attention.width(config.d_model),
        "n_inner": None if mlp.d_ff == 4 * config.d_model else mlp.d_ff,
        "resid_pdrop": block.dropout,
        "attn_pdrop": block.attention.dropout,
        "embd_pdrop": config.inputs.dropout,
        "activation_function": their_activation(mlp.activation),
        "layer_norm_epsilon": block.norm.epsilon,
    }


def find_heads(fields: Json, tensors: Any) -> Heads:
    """The heads; that of the next token has a bias."""
    return decoder_heads.find(fields, tensors, lm_bias=True)


GPTJ = Family(
    model_type="gptj",
    class_name="GPTJ",
    prefix="transformer.",
    trunk=rows(
        embedding("wte", "embed.tokens"),
        norm("h.{}.ln_1", "attention_norm"),
        linear("h.{}.attn.q_proj", "attention.query"),
        linear("h.{}.attn.k_proj", "attention.key"),
        linear("h.{}.attn.v_proj", "attention.value"),
        linear("h.{}.attn.out_proj", "attention.out"),
        linear("h.{}.mlp.fc_in", "feed_forward.up"),
        linear("h.{}.mlp.fc_out", "feed_forward.down"),
        norm("ln_f", "final_norm"),
    ),
    heads=(*decoder_heads.TABLE, Rule("lm_head.bias", "heads.lm.bias")),
    tied={"lm_head.weight": "wte.weight"},
    ignored=(r"h\.\d+\.attn\.(masked_)?bias", r"h\.\d+\.attn\.embed_positions"),
    defaults={
        "n_layer": 28,
        "n_embd": 4096,
        "n_head": 16,
        "rotary_dim": 64,
        "n_inner": None,
        "vocab_size": 50400,
        "resid_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
    },
    from_hf=from_hf,
    to_hf=to_hf,
    find_heads=find_heads,
    architecture=decoder_heads.architecture("GPTJ", token_classes=False),
)
