"""Llama in transformers, and in GGUF files under llama.cpp's names."""

from typing import Any

from effscale.interop.families import decoder_heads, rope
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
from effscale.models import MLPConfig, Rotary, TransformerConfig, llama


def from_hf(fields: Json, heads: Heads) -> TransformerConfig:
    """Our config; ``pretraining_tp`` only ordered sums and is left out."""
    rotary = rope.parameters(fields, fraction="partial_rotary_factor", default=1.0)
    if rotary["partial_rotary_factor"] != 1:
        raise FolderError(
            f"config.json has partial_rotary_factor={rotary['partial_rotary_factor']}, and transformers' Llama rotates all of "
            "each head"
        )
    config = llama(
        num_layers=fields["num_hidden_layers"],
        d_model=fields["hidden_size"],
        num_heads=fields["num_attention_heads"],
        num_kv_heads=fields["num_key_value_heads"],
        head_dim=fields["head_dim"],
        d_ff=fields["intermediate_size"],
        vocab_size=fields["vocab_size"],
        rotary_base=rotary["rope_theta"],
        rotary_scaling=rope.scaling(rotary),
        bias=fields["attention_bias"],
        mlp_bias=fields["mlp_bias"],
        attention_dropout=fields["attention_dropout"],
        activation=activation(fields["hidden_act"]),
        epsilon=fields["rms_norm_eps"],
    )
    return with_heads(config, heads)


def to_hf(config: TransformerConfig) -> dict[str, Any]:
    """The fields of ``config.json``."""
    block = config.blocks[0]
    attention = block.attention
    mlp = part(block.feed_forward, MLPConfig)
    positions = part(config.positions, Rotary)
    head_dim = attention.width(config.d_model)
    return (
        common(config)
        | rope.fields_of(positions, head_dim)
        | {
            "num_hidden_layers": config.num_layers,
            "hidden_size": config.d_model,
            "num_attention_heads": attention.num_heads,
            "num_key_value_heads": attention.kv_heads,
            "head_dim": head_dim,
            "intermediate_size": mlp.d_ff,
            "attention_bias": attention.bias,
            "mlp_bias": mlp.bias,
            "attention_dropout": attention.dropout,
            "hidden_act": their_activation(mlp.activation),
            "rms_norm_eps": block.norm.epsilon,
        }
    )


LLAMA = Family(
    model_type="llama",
    class_name="Llama",
    prefix="model.",
    prefixes={"LlamaForQuestionAnswering": "transformer."},
    trunk=rows(
        embedding("embed_tokens", "embed.tokens"),
        norm("layers.{}.input_layernorm", "attention_norm"),
        linear("layers.{}.self_attn.q_proj", "attention.query"),
        linear("layers.{}.self_attn.k_proj", "attention.key"),
        linear("layers.{}.self_attn.v_proj", "attention.value"),
        linear("layers.{}.self_attn.o_proj", "attention.out"),
        norm("layers.{}.post_attention_layernorm", "feed_forward_norm"),
        linear("layers.{}.mlp.gate_proj", "feed_forward.gate"),
        linear("layers.{}.mlp.up_proj", "feed_forward.up"),
        linear("layers.{}.mlp.down_proj", "feed_forward.down"),
        norm("norm", "final_norm"),
    ),
    heads=decoder_heads.TABLE + linear("score", "heads.token_classes.dense"),
    tied={"lm_head.weight": "embed_tokens.weight"},
    ignored=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"rotary_emb\.inv_freq"),
    defaults={
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "intermediate_size": 11008,
        "vocab_size": 32000,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    from_hf=from_hf,
    to_hf=to_hf,
    find_heads=decoder_heads.find,
    architecture=decoder_heads.architecture("Llama"),
)

# llama.cpp rotates neighbouring pairs, so its query and key rows are those of Llama in another order.
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
