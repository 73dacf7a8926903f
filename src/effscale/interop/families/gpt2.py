"""GPT-2 in transformers: ``Conv1D`` layers, fused query, key and value."""

from effscale.interop.families import decoder_heads
from effscale.interop.families.family import Family
from effscale.interop.families.fields import Field, activation, found
from effscale.interop.table import conv1d, embedding, fused_conv1d, norm, rows
from effscale.models import TransformerConfig, gpt2


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
        Field("n_layer", 12, "num_layers"),
        Field("n_embd", 768, "d_model"),
        Field("n_head", 12, "num_heads"),
        Field("n_inner", None, "d_ff", write=inner_width),
        Field("n_positions", 1024, "max_length"),
        Field("vocab_size", 50257, "vocab_size"),
        Field("resid_pdrop", 0.1, "dropout"),
        Field("attn_pdrop", 0.1, "attention_dropout"),
        Field("embd_pdrop", 0.1, "embed_dropout"),
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
