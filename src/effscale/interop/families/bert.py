"""BERT in transformers, with any of its heads."""

from collections.abc import Mapping

from effscale.interop.families.family import (
    Family,
    Heads,
    check_classifiers,
    classifier_dropout,
    named_class,
)
from effscale.interop.families.fields import Field, Json, activation, our_activation
from effscale.interop.table import Rule, embedding, linear, norm, rows
from effscale.interop.tensors import TensorInfo
from effscale.models import ClassHead, HeadConfig, LMHead, NormConfig, bert

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


def find_heads(fields: Json, tensors: Mapping[str, TensorInfo]) -> Heads:
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


def architecture(heads: Heads) -> str:
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
        Field("num_hidden_layers", 12, "num_layers"),
        Field("hidden_size", 768, "d_model"),
        Field("num_attention_heads", 12, "num_heads"),
        Field("intermediate_size", 3072, "d_ff"),
        Field("vocab_size", 30522, "vocab_size"),
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
        linear("encoder.layer.{}.attention.self.query", "attention.query"),
        linear("encoder.layer.{}.attention.self.key", "attention.key"),
        linear("encoder.layer.{}.attention.self.value", "attention.value"),
        linear("encoder.layer.{}.attention.output.dense", "attention.out"),
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
    find_heads=find_heads,
    architecture=architecture,
)
