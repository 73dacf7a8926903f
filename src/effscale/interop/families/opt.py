"""OPT in transformers; ``layerdrop``, a regularizer for training, is ignored."""

from operator import not_
from typing import Any

from effscale.interop.families import decoder_heads
from effscale.interop.families.family import Family
from effscale.interop.families.fields import Field, Json, activation
from effscale.interop.table import embedding, linear, norm, rows
from effscale.models import TransformerConfig, opt


def is_pre_norm(config: TransformerConfig) -> bool:
    """Return whether a layer's norms precede its parts."""
    return config.blocks[0].residual == "pre"


def lacks_final_norm(config: TransformerConfig) -> bool:
    """Return whether the final norm is missing; a post-norm model never has one."""
    return is_pre_norm(config) and config.final_norm is None


def read(fields: Json) -> dict[str, Any]:
    """Return the embedding width; an embedding as wide as the model is not projected."""
    same = fields["word_embed_proj_dim"] == fields["hidden_size"]
    return {"d_embed": None} if same else {}


OPT = Family(
    model_type="opt",
    class_name="OPT",
    make=opt,
    fields=(
        Field("num_hidden_layers", 12, "num_layers"),
        Field("hidden_size", 768, "d_model"),
        Field("num_attention_heads", 12, "num_heads"),
        Field("ffn_dim", 3072, "d_ff"),
        Field("vocab_size", 50272, "vocab_size"),
        Field("max_position_embeddings", 2048, "max_length"),
        Field("word_embed_proj_dim", None, "d_embed"),
        Field("do_layer_norm_before", True, "post_norm", read=not_, write=is_pre_norm),
        Field("_remove_final_layer_norm", False, "final_norm", read=not_, write=lacks_final_norm),
        Field("enable_bias", True, "bias"),
        Field("layer_norm_elementwise_affine", True, "norm_affine"),
        activation("activation_function", "relu"),
        Field("dropout", 0.1, "dropout"),
        Field("attention_dropout", 0.0, "attention_dropout"),
        Field("tie_word_embeddings", True),
    ),
    read=read,
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
    find_heads=decoder_heads.find,
    architecture=decoder_heads.architecture("OPT", token_classes=False),
)
