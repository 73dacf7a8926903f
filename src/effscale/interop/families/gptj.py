"""GPT-J in transformers."""

from typing import Any

from effscale.interop.families import decoder_heads
from effscale.interop.families.family import Family, Heads
from effscale.interop.families.fields import Field, Json, activation, found
from effscale.interop.families.gpt2 import inner_width
from effscale.interop.table import Rule, embedding, linear, norm, rows
from effscale.models import TransformerConfig, gptj


def rotary_dim(config: TransformerConfig) -> int:
    """Return how many dimensions of a head rotate, even if all do."""
    return found(config, "rotary_dim") or config.blocks[0].attention.width(config.d_model)


def find_heads(fields: Json, tensors: Any) -> Heads:
    """Return the heads; the next-token head has a bias."""
    return decoder_heads.find(fields, tensors, lm_bias=True)


GPTJ = Family(
    model_type="gptj",
    class_name="GPTJ",
    make=gptj,
    fields=(
        Field("n_layer", 28, "num_layers"),
        Field("n_embd", 4096, "d_model"),
        Field("n_head", 16, "num_heads"),
        Field("rotary_dim", 64, "rotary_dim", write=rotary_dim),
        Field("n_inner", None, "d_ff", write=inner_width),
        Field("vocab_size", 50400, "vocab_size"),
        Field("resid_pdrop", 0.0, "dropout"),
        Field("attn_pdrop", 0.0, "attention_dropout"),
        Field("embd_pdrop", 0.0, "embed_dropout"),
        activation("activation_function", "gelu_new"),
        Field("layer_norm_epsilon", 1e-5, "epsilon"),
        Field("tie_word_embeddings", False),
    ),
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
    find_heads=find_heads,
    architecture=decoder_heads.architecture("GPTJ", token_classes=False),
)
