"""Decoders with learned, rotary or ALiBi positions in transformers: GPT-2, OPT, BLOOM, GPT-J, and GPT-NeoX with Pythia.

OPT's ``layerdrop``, a regularizer for training, is ignored.
"""

import functools
from operator import not_
from typing import Any

from effscale.interop.families import decoder_heads, rope
from effscale.interop.families.family import Family
from effscale.interop.families.fields import GPT_SIZES, Field, Json, activation, found, sizes
from effscale.interop.table import (
    Rule,
    conv1d,
    embedding,
    fused_by_head,
    fused_conv1d,
    linear,
    norm,
    projections,
    rows,
)
from effscale.models import TransformerConfig, bloom, gpt2, gptj, neox, opt


def gpt_dropouts(rate: float) -> tuple[Field, ...]:
    """Return the dropouts of GPT-2 and GPT-J, with their default."""
    return (
        Field("resid_pdrop", rate, "dropout"),
        Field("attn_pdrop", rate, "attention_dropout"),
        Field("embd_pdrop", rate, "embed_dropout"),
    )


def inner_width(config: TransformerConfig) -> int | None:
    """Return the width inside the feed-forward; None stands for four times the model's width."""
    d_ff = found(config, "d_ff")
    return None if d_ff == 4 * config.d_model else d_ff


def is_scaled(config: TransformerConfig) -> bool:
    """Return whether scores are divided by the square root of the head width."""
    attention = config.blocks[0].attention  # the first layer's scores are divided by 1
    return attention.scale in (None, attention.width(config.d_model) ** -0.5)


def is_scaled_by_layer(config: TransformerConfig) -> bool:
    """Return whether scores are also divided by the layer number."""
    return config.blocks[0].attention.scale != config.blocks[-1].attention.scale


GPT2 = Family(
    model_type="gpt2",
    class_name="GPT2",
    make=gpt2,
    fields=(
        *sizes(12, 768, 12, 50257, names=GPT_SIZES),
        Field("n_inner", None, "d_ff", write=inner_width),
        Field("n_positions", 1024, "max_length"),
        *gpt_dropouts(0.1),
        activation("activation_function", "gelu_new"),
        Field("layer_norm_epsilon", 1e-5, "epsilon"),
        Field("scale_attn_weights", True, "scale_attention", write=is_scaled),
        Field("scale_attn_by_inverse_layer_idx", False, "scale_by_layer", write=is_scaled_by_layer),
        Field("tie_word_embeddings", True),
    ),
    only={"add_cross_attention": False},
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
    find_heads=decoder_heads.find,
    architecture=decoder_heads.architecture("GPT2", lm="LMHeadModel"),
)


def is_pre_norm(config: TransformerConfig) -> bool:
    """Return whether a layer's norms precede its parts."""
    return found(config, "residual") == "pre"


def lacks_final_norm(config: TransformerConfig) -> bool:
    """Return whether the final norm is missing; a post-norm model never has one."""
    return is_pre_norm(config) and config.final_norm is None


def read_opt(fields: Json) -> dict[str, Any]:
    """Return the embedding width; an embedding as wide as the model is not projected."""
    same = fields["word_embed_proj_dim"] == fields["hidden_size"]
    return {"d_embed": None} if same else {}


OPT = Family(
    model_type="opt",
    class_name="OPT",
    make=opt,
    fields=(
        *sizes(12, 768, 12, 50272),
        Field("ffn_dim", 3072, "d_ff"),
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
    read=read_opt,
    prefix="model.",
    trunk=rows(
        embedding("decoder.embed_tokens", "embed.tokens"),
        embedding("decoder.embed_positions", "embed.positions"),
        linear("decoder.project_in", "embed.into"),
        linear("decoder.project_out", "embed.out_of"),
        norm("decoder.layers.{}.self_attn_layer_norm", "attention_norm"),
        projections("decoder.layers.{}.self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
        norm("decoder.layers.{}.final_layer_norm", "feed_forward_norm"),
        linear("decoder.layers.{}.fc1", "feed_forward.up"),
        linear("decoder.layers.{}.fc2", "feed_forward.down"),
        norm("decoder.final_layer_norm", "final_norm"),
    ),
    heads=decoder_heads.TABLE,
    tied={"lm_head.weight": "decoder.embed_tokens.weight"},
    find_heads=decoder_heads.find,
    architecture=decoder_heads.architecture("OPT", lacks=["token_classes"]),
)


OLDER = {
    "num_layers": "num_hidden_layers",
    "d_model": "n_embed",
    "num_heads": "num_attention_heads",
}
"""Names of the sizes in old configs; if present, they take precedence."""


def read_older_sizes(fields: Json) -> dict[str, Any]:
    """Return the sizes that the config has under their older names."""
    return {ours: fields[name] for ours, name in OLDER.items() if fields[name] is not None}


BLOOM = Family(
    model_type="bloom",
    class_name="Bloom",
    make=bloom,
    fields=(
        *sizes(2, 64, 8, 250880, names=("n_layer", "hidden_size", "n_head")),
        *(Field(name, None) for name in OLDER.values()),
        Field(
            "apply_residual_connection_post_layernorm",
            False,
            "normed_residual",
            write=lambda config: found(config, "residual") == "pre_normed",
        ),
        Field("hidden_dropout", 0.0, "dropout"),
        Field("attention_dropout", 0.0, "attention_dropout"),
        Field("layer_norm_epsilon", 1e-5, "epsilon"),
        Field("tie_word_embeddings", True),
    ),
    read=read_older_sizes,
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


def rotary_dim(config: TransformerConfig) -> int:
    """Return how many dimensions of a head rotate, even if all do."""
    return found(config, "rotary_dim") or config.blocks[0].attention.width(config.d_model)


GPTJ = Family(
    model_type="gptj",
    class_name="GPTJ",
    make=gptj,
    fields=(
        *sizes(28, 4096, 16, 50400, names=GPT_SIZES),
        Field("rotary_dim", 64, "rotary_dim", write=rotary_dim),
        Field("n_inner", None, "d_ff", write=inner_width),
        *gpt_dropouts(0.0),
        activation("activation_function", "gelu_new"),
        Field("layer_norm_epsilon", 1e-5, "epsilon"),
        Field("tie_word_embeddings", False),
    ),
    prefix="transformer.",
    trunk=rows(
        embedding("wte", "embed.tokens"),
        norm("h.{}.ln_1", "attention_norm"),
        projections("h.{}.attn", "q_proj", "k_proj", "v_proj", "out_proj"),
        linear("h.{}.mlp.fc_in", "feed_forward.up"),
        linear("h.{}.mlp.fc_out", "feed_forward.down"),
        norm("ln_f", "final_norm"),
    ),
    heads=(*decoder_heads.TABLE, Rule("lm_head.bias", "heads.lm.bias")),
    tied={"lm_head.weight": "wte.weight"},
    ignored=(r"h\.\d+\.attn\.(masked_)?bias", r"h\.\d+\.attn\.embed_positions"),
    find_heads=functools.partial(decoder_heads.find, lm_bias=True),
    architecture=decoder_heads.architecture("GPTJ", lacks=["token_classes"]),
)


def read_neox(fields: Json) -> dict[str, Any]:
    """Return the rotary positions."""
    rotary = rope.parameters(fields, theta="rotary_emb_base", fraction="rotary_pct", default=0.25)
    return rope.arguments(rotary) | {"rotary_fraction": rotary["partial_rotary_factor"]}


def write_neox(config: TransformerConfig) -> dict[str, Any]:
    """Return the fields of the rotary positions, with the fraction of a head that rotates, whose default is a quarter."""
    fields = rope.write(config)
    fields["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
    return fields


NEOX = Family(
    model_type="gpt_neox",
    class_name="GPTNeoX",
    make=neox,
    fields=(
        *sizes(44, 6144, 64, 50432),
        Field("intermediate_size", 24576, "d_ff"),
        Field(
            "use_parallel_residual",
            True,
            "parallel",
            write=lambda config: found(config, "residual") == "parallel",
        ),
        Field("attention_bias", True, "bias"),
        Field("hidden_dropout", 0.0, "dropout"),
        Field("attention_dropout", 0.0, "attention_dropout"),
        Field("classifier_dropout", 0.1),
        activation("hidden_act", "gelu"),
        Field("layer_norm_eps", 1e-5, "epsilon"),
        Field("tie_word_embeddings", False),
    ),
    read=read_neox,
    write=write_neox,
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
