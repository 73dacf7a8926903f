"""ViT in transformers."""

from collections.abc import Mapping
from typing import Any

from effscale.interop.families.family import (
    Family,
    Heads,
    Json,
    activation,
    check_classifiers,
    labels,
    part,
    refuse,
    their_activation,
    with_heads,
)
from effscale.interop.table import Rule, linear, norm, rows
from effscale.interop.tensors import TensorInfo
from effscale.models import ClassHead, MLPConfig, PatchInputs, TransformerConfig, vit


def find_heads(fields: Json, tensors: Mapping[str, TensorInfo]) -> Heads:
    """The classifier on the class token, where there is one."""
    del fields
    if "classifier.weight" not in tensors:
        return ()
    return (ClassHead(num_classes=tensors["classifier.weight"].shape[0]),)


def from_hf(fields: Json, heads: Heads) -> TransformerConfig:
    """Our config; whether there is a pooler the file tells."""
    refuse(fields, pooler_output_size=fields["hidden_size"])
    config = vit(
        num_layers=fields["num_hidden_layers"],
        d_model=fields["hidden_size"],
        num_heads=fields["num_attention_heads"],
        d_ff=fields["intermediate_size"],
        image_size=fields["image_size"],
        patch_size=fields["patch_size"],
        channels=fields["num_channels"],
        num_classes=None,
        qkv_bias=fields["qkv_bias"],
        dropout=fields["hidden_dropout_prob"],
        attention_dropout=fields["attention_probs_dropout_prob"],
        activation=activation(fields["hidden_act"]),
        epsilon=fields["layer_norm_eps"],
        pooler=fields["add_pooling_layer"],
        pooler_activation=activation(fields["pooler_act"]),
    )
    return with_heads(config, heads)


def to_hf(config: TransformerConfig) -> dict[str, Any]:
    """The fields of ``config.json``."""
    block = config.blocks[0]
    mlp = part(block.feed_forward, MLPConfig)
    inputs = part(config.inputs, PatchInputs)
    return labels(config) | {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.d_model,
        "num_attention_heads": block.attention.num_heads,
        "intermediate_size": mlp.d_ff,
        "image_size": inputs.image_size,
        "patch_size": inputs.patch_size,
        "num_channels": inputs.channels,
        "qkv_bias": block.attention.bias,
        "hidden_dropout_prob": block.dropout,
        "attention_probs_dropout_prob": block.attention.dropout,
        "hidden_act": their_activation(mlp.activation),
        "layer_norm_eps": block.norm.epsilon,
        "pooler_output_size": config.d_model,
        "pooler_act": their_activation(config.pooler_activation),
        "add_pooling_layer": config.pooler,
    }


def architecture(heads: Heads) -> str:
    """The class in transformers that has these heads."""
    names = [head.name for head in heads]
    check_classifiers(heads, classes=("first", True))
    if names not in ([], ["classes"]):
        raise ValueError(f"transformers has no ViT with the heads {names}")
    return "ViTForImageClassification" if names else "ViTModel"


VIT = Family(
    model_type="vit",
    class_name="ViT",
    prefix="vit.",
    trunk=rows(
        (
            Rule("embeddings.cls_token", "embed.first", "1 1 d -> d"),
            Rule("embeddings.position_embeddings", "embed.positions.embedding", "1 s d -> s d"),
            Rule(
                "embeddings.patch_embeddings.projection.weight",
                "embed.patches.kernel",
                "o c p q -> (p q c) o",
            ),
            Rule("embeddings.patch_embeddings.projection.bias", "embed.patches.bias"),
        ),
        norm("encoder.layer.{}.layernorm_before", "attention_norm"),
        linear("encoder.layer.{}.attention.attention.query", "attention.query"),
        linear("encoder.layer.{}.attention.attention.key", "attention.key"),
        linear("encoder.layer.{}.attention.attention.value", "attention.value"),
        linear("encoder.layer.{}.attention.output.dense", "attention.out"),
        norm("encoder.layer.{}.layernorm_after", "feed_forward_norm"),
        linear("encoder.layer.{}.intermediate.dense", "feed_forward.up"),
        linear("encoder.layer.{}.output.dense", "feed_forward.down"),
        norm("layernorm", "final_norm"),
        linear("pooler.dense", "pooler"),
    ),
    heads=linear("classifier", "heads.classes.dense"),
    ignored=(r"embeddings\.mask_token",),  # only masked image modelling uses it
    in_memory={
        "encoder.layer.{}.attention.attention.query": "layers.{}.attention.q_proj",
        "encoder.layer.{}.attention.attention.key": "layers.{}.attention.k_proj",
        "encoder.layer.{}.attention.attention.value": "layers.{}.attention.v_proj",
        "encoder.layer.{}.attention.output.dense": "layers.{}.attention.o_proj",
        "encoder.layer.{}.intermediate.dense": "layers.{}.mlp.fc1",
        "encoder.layer.{}.output.dense": "layers.{}.mlp.fc2",
        "encoder.layer.{}.layernorm_before": "layers.{}.layernorm_before",
        "encoder.layer.{}.layernorm_after": "layers.{}.layernorm_after",
    },
    defaults={
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "image_size": 224,
        "patch_size": 16,
        "num_channels": 3,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "pooler_act": "tanh",
    },
    from_hf=from_hf,
    to_hf=to_hf,
    find_heads=find_heads,
    architecture=architecture,
)
