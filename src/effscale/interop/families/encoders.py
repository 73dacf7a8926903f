"""BERT with any of its heads, and ViT, in transformers."""

import functools
from collections.abc import Mapping
from typing import Any

from effscale.interop.families.family import (
    Family,
    Heads,
    check_classifiers,
    classifier_dropout,
    named_class,
)
from effscale.interop.families.fields import (
    Field,
    Json,
    activation,
    our_activation,
    refuse,
    sizes,
)
from effscale.interop.foreign import Fields, shown
from effscale.interop.table import Rule, embedding, linear, norm, projections, rows
from effscale.interop.tensors import FolderError, TensorInfo
from effscale.models import ClassHead, LMHead, NormConfig, bert, vit
from effscale.models.config import HeadConfig

# Names of heads, and the class in transformers that has exactly these.
ARCHITECTURES = {
    (): "Model",
    ("mlm", "nsp"): "ForPreTraining",
    ("mlm",): "ForMaskedLM",
    ("nsp",): "ForNextSentencePrediction",
    ("span",): "ForQuestionAnswering",
    ("classes",): "ForSequenceClassification",
    ("score",): "ForSequenceClassification",
    ("choice",): "ForMultipleChoice",
    ("token_classes",): "ForTokenClassification",
}


def bert_heads(fields: Json, tensors: Mapping[str, TensorInfo]) -> Heads:
    """Return the heads whose tensors are in the file."""
    heads: list[HeadConfig] = []
    if "cls.predictions.transform.dense.weight" in tensors:
        heads.append(
            LMHead(
                name="mlm",
                tied=bool(fields["tie_word_embeddings"]),
                bias=True,
                transform=our_activation(fields["hidden_act"]),
                norm=NormConfig(epsilon=fields["layer_norm_eps"]),
            )
        )
    if "cls.seq_relationship.weight" in tensors:
        heads.append(ClassHead(name="nsp", num_classes=2, pool="pooled"))
    if "classifier.weight" in tensors:
        architecture = named_class(fields)
        # Some old files of a class without a pooler contain one.
        each_token = architecture.endswith("ForTokenClassification") or not has_pooler(tensors)
        choice = "choice" if architecture.endswith("ForMultipleChoice") else "classes"
        heads.append(
            ClassHead(
                name="token_classes" if each_token else choice,
                num_classes=tensors["classifier.weight"].shape[0],
                pool="none" if each_token else "pooled",
                dropout=classifier_dropout(fields, "hidden_dropout_prob"),
            )
        )
    if "qa_outputs.weight" in tensors:
        heads.append(ClassHead(name="span", num_classes=2, pool="none"))
    return tuple(heads)


def has_pooler(tensors: Mapping[str, TensorInfo]) -> bool:
    """Return whether the file has a pooler."""
    return "pooler.dense.weight" in tensors


def bert_class(heads: Heads) -> str:
    """Return the class in transformers that has these heads."""
    names = tuple(head.name for head in heads)
    pooled = dict.fromkeys(("nsp", "classes", "score", "choice"), ("pooled", True))
    check_classifiers(heads, **pooled, token_classes=("none", True), span=("none", True))
    if names not in ARCHITECTURES:
        raise ValueError(
            f"transformers has no BERT with the heads {list(names)}. Use one of {list(ARCHITECTURES)}"
        )
    return f"Bert{ARCHITECTURES[names]}"


BERT = Family(
    model_type="bert",
    class_name="Bert",
    make=bert,
    fields=(
        *sizes(12, 768, 12, 30522),
        Field("intermediate_size", 3072, "d_ff"),
        Field("max_position_embeddings", 512, "max_length"),
        Field("type_vocab_size", 2, "type_vocab_size"),
        Field("hidden_dropout_prob", 0.1, "dropout"),
        Field("attention_probs_dropout_prob", 0.1, "attention_dropout"),
        activation("hidden_act", "gelu"),
        Field("layer_norm_eps", 1e-12, "epsilon"),
        Field("add_pooling_layer", False, "pooler"),  # the loader derives it from the tensors
        Field("tie_word_embeddings", True),
    ),
    only={"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"},
    prefix="bert.",
    trunk=rows(
        embedding("embeddings.word_embeddings", "embed.tokens"),
        embedding("embeddings.position_embeddings", "embed.positions"),
        embedding("embeddings.token_type_embeddings", "embed.types"),
        norm("embeddings.LayerNorm", "embed.norm"),
        projections(
            "encoder.layer.{}.attention", "self.query", "self.key", "self.value", "output.dense"
        ),
        norm("encoder.layer.{}.attention.output.LayerNorm", "attention_norm"),
        linear("encoder.layer.{}.intermediate.dense", "feed_forward.up"),
        linear("encoder.layer.{}.output.dense", "feed_forward.down"),
        norm("encoder.layer.{}.output.LayerNorm", "feed_forward_norm"),
        linear("pooler.dense", "pooler"),
    ),
    heads=rows(
        linear("cls.predictions.transform.dense", "heads.mlm.transform"),
        norm("cls.predictions.transform.LayerNorm", "heads.mlm.norm"),
        (
            Rule("cls.predictions.decoder.weight", "heads.mlm.project.kernel", "o i -> i o"),
            Rule("cls.predictions.bias", "heads.mlm.bias"),
        ),
        linear("cls.seq_relationship", "heads.nsp.dense"),
        linear("classifier", "heads.classes.dense"),
        linear("classifier", "heads.score.dense"),
        linear("classifier", "heads.token_classes.dense"),
        linear("classifier", "heads.choice.dense"),
        linear("qa_outputs", "heads.span.dense"),
    ),
    tied={
        "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    ignored=(r"embeddings\.position_ids",),
    # Files that were converted from TensorFlow.
    aliases=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    find_heads=bert_heads,
    architecture=bert_class,
)


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


def refuse_width(fields: Json) -> dict[str, Any]:
    """Reject a pooler whose width differs from the model's."""
    refuse(fields, pooler_output_size=fields["hidden_size"])
    return {}


def vit_heads(fields: Json, tensors: Mapping[str, TensorInfo]) -> Heads:
    """Return the classifier on the class token, if there is one."""
    del fields
    if "classifier.weight" not in tensors:
        return ()
    return (ClassHead(num_classes=tensors["classifier.weight"].shape[0]),)


def vit_class(heads: Heads) -> str:
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
        *sizes(12, 768, 12),
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
    read=refuse_width,
    write=lambda config: {"pooler_output_size": config.d_model},
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
        projections(
            "encoder.layer.{}.attention",
            "attention.query",
            "attention.key",
            "attention.value",
            "output.dense",
        ),
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
    find_heads=vit_heads,
    architecture=vit_class,
)
