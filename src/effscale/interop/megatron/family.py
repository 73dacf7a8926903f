"""GPTs with experts of Megatron-DeepSpeed. transformers has no such family, so ``load_pretrained`` does not support it."""

from effscale.interop.families.family import Family
from effscale.interop.families.mixtures import plain
from effscale.interop.table import (
    QUERY_KEY_VALUE,
    Rule,
    embedding,
    fused_by_head,
    linear,
    norm,
    rows,
)
from effscale.interop.tensors import FolderError
from effscale.models import LMHead, MLPConfig, gpt2
from effscale.moe.layer import MoEConfig

LAYER = "language_model.encoder.layers.{}"
EXPERT = f"{LAYER}.mlp.deepspeed_moe.experts.deepspeed_experts.{{}}"
ATTENTION = f"{LAYER}.self_attention.query_key_value"

TRUNK = rows(
    embedding("language_model.embedding.word_embeddings", "embed.tokens"),
    embedding("language_model.embedding.position_embeddings", "embed.positions"),
    norm(f"{LAYER}.input_layernorm", "attention_norm"),
    fused_by_head(ATTENTION),
    linear(f"{LAYER}.self_attention.dense", "attention.out"),
    norm(f"{LAYER}.post_attention_layernorm", "feed_forward_norm"),
    linear(f"{LAYER}.mlp.dense_h_to_4h", "feed_forward.up"),
    linear(f"{LAYER}.mlp.dense_4h_to_h", "feed_forward.down"),
    linear(f"{LAYER}.mlp.deepspeed_moe.gate.wg", "feed_forward.router.logits")[:1],
    linear(f"{EXPERT}.dense_h_to_4h", "feed_forward.experts.up"),
    linear(f"{EXPERT}.dense_4h_to_h", "feed_forward.experts.down"),
    linear(f"{LAYER}.mlp.mlp.dense_h_to_4h", "feed_forward.shared.up"),
    linear(f"{LAYER}.mlp.mlp.dense_4h_to_h", "feed_forward.shared.down"),
    linear(f"{LAYER}.mlp.coefficient", "feed_forward.coefficient"),
    norm("language_model.encoder.final_layernorm", "final_norm"),
)
"""The table rows of checkpoints of version 2 and later."""


def table(version: float) -> tuple[Rule, ...]:
    """Return the table rows of the trunk; the checkpoint version determines the order of queries, keys and values in their matrix."""
    orders = {0: "(n h d)", 1: "(h d n)"}
    if version >= 2:
        return TRUNK
    if version not in orders:
        raise FolderError(f"checkpoint_version must be 0, 1, or at least 2, got {version}")
    order, parts = orders[version], lambda kind: tuple(f"{part}.{kind}" for part in QUERY_KEY_VALUE)
    other = (
        Rule(f"{ATTENTION}.weight", parts("kernel"), f"{order} i -> n i (h d)"),
        Rule(f"{ATTENTION}.bias", parts("bias"), f"{order} -> n (h d)"),
    )
    return tuple(rule for rule in TRUNK if not rule.theirs.startswith(ATTENTION)) + other


MEGATRON = Family(
    model_type="megatron-deepspeed",
    class_name="GPT",
    make=gpt2,
    fields=(),
    prefix="",
    trunk=TRUNK,
    heads=linear("language_model.output_layer", "heads.lm.project")[:1],
    find_heads=lambda fields, tensors: (LMHead(),),
    architecture=lambda heads: "GPTModel",
    feed_forwards=(MLPConfig, MoEConfig),
    plain=plain,
)
"""The config is read from the training arguments (``effscale.interop.megatron.args``) instead of a ``config.json``."""
