"""ViT in transformers."""

import functools
from collections.abc import Mapping
from typing import Any

from effscale.interop.families.family import Family, Heads, check_classifiers
from effscale.interop.families.fields import Field, Json, activation, refuse
from effscale.interop.foreign import Fields, shown
from effscale.interop.table import Rule, linear, norm, rows
from effscale.interop.tensors import FolderError, TensorInfo
from effscale.models import ClassHead, TransformerConfig, vit


class Square(Field):
    """A size in pixels, given as one number or as two equal ones."""

    def checked(self, fields: Json) -> int:
        """Return the size as one number."""
        given = fields[self.name]
        pair = given if isinstance(given, list) and len(given) == 2 else [given]
        sizes = {Fields("config.json", {self.name: size}).whole(self.name) for size in pair}
        if len(sizes) != 1:
            raise FolderError(f"config.json: {self.name} must be square, got {shown(given)}")
        return sizes.pop()


def read(fields: Json) -> dict[str, Any]:
    """Reject a pooler whose width differs from the model's."""
    refuse(fields, pooler_output_size=fields["hidden_size"])
    return {}


def write(config: TransformerConfig) -> dict[str, Any]:
    """Return the width of the pooler."""
    return {"pooler_output_size": config.d_model}


def find_heads(fields: Json, tensors: Mapping[str, TensorInfo]) -> Heads:
    """Return the classifier on the class token, if there is one."""
    del fields
    if "classifier.weight" not in tensors:
        return ()
    return (ClassHead(num_classes=tensors["classifier.weight"].shape[0]),)


def architecture(heads: Heads) -> str:
    """Return the class in transformers that has these heads."""
    names = [head.name for head in heads]
    check_classifiers(heads, classes=("first", True))
    if names not in ([], ["classes"]):
        raise ValueError(f"transformers has no ViT with the heads {names}")
    return "ViTForImageClassification" if names else "ViTModel"


VIT = Family(
    model_type="vit",
    class_name="ViT",
    make=functools.partial(vit, num_classes=None),
    fields=(
        Field("num_hidden_layers", 12, "num_layers"),
        Field("hidden_size", 768, "d_model"),
        Field("num_attention_heads", 12, "num_heads"),
        Field("intermediate_size", 3072, "d_ff"),
        Square("image_size", 224, "image_size"),
        Square("patch_size", 16, "patch_size"),
        Field("num_channels", 3, "channels"),
        Field("qkv_bias", True, "qkv_bias"),
        Field("hidden_dropout_prob", 0.0, "dropout"),
        Field("attention_probs_dropout_prob", 0.0, "attention_dropout"),
        activation("hidden_act", "gelu"),
        Field("layer_norm_eps", 1e-12, "epsilon"),
        Field("add_pooling_layer", False, "pooler"),  # the loader derives it from the tensors
        activation("pooler_act", "tanh", "pooler_activation"),
    ),
    read=read,
    write=write,
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
    ignored=(r"embeddings\.mask_token",),  # used only by masked image modeling
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
    find_heads=find_heads,
    architecture=architecture,
)
