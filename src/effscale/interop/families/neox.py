"""GPT-NeoX and Pythia in transformers: query, key and value fused head by head."""

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
from effscale.interop.table import embedding, fused_by_head, linear, norm, rows
from effscale.models import MLPConfig, Rotary, TransformerConfig, neox


def from_hf(fields: Json, heads: Heads) -> TransformerConfig:
    """Our config."""
    rotary = rope.parameters(fields, theta="rotary_emb_base", fraction="rotary_pct", default=0.25)
    config = neox(
        num_layers=fields["num_hidden_layers"],
        d_model=fields["hidden_size"],
        num_heads=fields["num_attention_heads"],
        d_ff=fields["intermediate_size"],
        vocab_size=fields["vocab_size"],
        rotary_fraction=rotary["partial_rotary_factor"],
        rotary_base=rotary["rope_theta"],
        rotary_scaling=rope.scaling(rotary),
        parallel=fields["use_parallel_residual"],
        bias=fields["attention_bias"],
        dropout=fields["hidden_dropout"],
        attention_dropout=fields["attention_dropout"],
        activation=activation(fields["hidden_act"]),
        epsilon=fields["layer_norm_eps"],
    )
    return with_heads(config, heads)


def to_hf(config: TransformerConfig) -> dict[str, Any]:
    """The fields of ``config.json``."""
    block = config.blocks[0]
    mlp = part(block.feed_forward, MLPConfig)
    positions = part(config.positions, Rotary)
    fields = common(config) | rope.fields_of(positions, block.attention.width(config.d_model))
    # Absent it would be a quarter.
    fields["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
    return fields | {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.d_model,
        "num_attention_heads": block.attention.num_heads,
        "intermediate_size": mlp.d_ff,
        "use_parallel_residual": block.residual == "parallel",
        "attention_bias": block.attention.bias,
        "hidden_dropout": block.dropout,
        "attention_dropout": block.attention.dropout,
        "hidden_act": their_activation(mlp.activation),
        "layer_norm_eps": block.norm.epsilon,
    }


NEOX = Family(
    model_type="gpt_neox",
    class_name="GPTNeoX",
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
    defaults={
        "num_hidden_layers": 44,
        "hidden_size": 6144,
        "num_attention_heads": 64,
        "intermediate_size": 24576,
        "vocab_size": 50432,
        "use_parallel_residual": True,
        "attention_bias": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "classifier_dropout": 0.1,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    from_hf=from_hf,
    to_hf=to_hf,
    find_heads=decoder_heads.find,
    architecture=decoder_heads.architecture("GPTNeoX"),
)
