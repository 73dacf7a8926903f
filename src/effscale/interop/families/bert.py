"""BERT in transformers, with whichever of its heads a file has."""

from collections.abc import Mapping
from typing import Any

from effscale.interop.families.family import (
    Family,
    Heads,
    Json,
    activation,
    check_classifiers,
    classifier_dropout,
    common,
    named_class,
    part,
    refuse,
    their_activation,
    with_heads,
)
from effscale.interop.table import Rule, embedding, linear, norm, rows
from effscale.interop.tensors import TensorInfo
from effscale.models import (
    ClassHead,
    HeadConfig,
    LearnedPositions,
    LMHead,
    MLPConfig,
    NormConfig,
    TokenInputs,
    TransformerConfig,
    bert,
)

# Names of heads and the class in transformers that has exactly these.
ARCHITECTURES = {
    (): "Model",
    ("mlm", "nsp"): "ForPreTraining",
    ("mlm",): "ForMaskedLM",
    ("nsp",): "ForNextSentencePrediction",
    ("span",): "ForQuestionAnswering",
    ("classes",): "ForSequenceClassification",
    ("choice",): "ForMultipleChoice",
    ("token_classes",): "ForTokenClassification",
}


def find_heads(fields: Json, tensors: Mapping[str, TensorInfo]) -> Heads:
    """The heads whose tensors are there."""
    heads: list[HeadConfig] = []
    if "cls.predictions.transform.dense.weight" in tensors:
        heads.append(
            LMHead(
                name="mlm",
                tied=bool(fields["tie_word_embeddings"]),
                bias=True,
                transform=activation(fields["hidden_act"]),
                norm=NormConfig(epsilon=fields["layer_norm_eps"]),
            )
        )
    if "cls.seq_relationship.weight" in tensors:
        heads.append(ClassHead(name="nsp", num_classes=2, pool="pooled"))
    if "classifier.weight" in tensors:
        architecture = named_class(fields)
        # Some old files of a class without a pooler have one nevertheless.
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
    """Whether the file has a pooler."""
    return "pooler.dense.weight" in tensors


def from_hf(fields: Json, heads: Heads) -> TransformerConfig:
    """Our config; whether there is a pooler the file tells."""
    refuse(fields, is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    config = bert(
        num_layers=fields["num_hidden_layers"],
        d_model=fields["hidden_size"],
        num_heads=fields["num_attention_heads"],
        d_ff=fields["intermediate_size"],
        vocab_size=fields["vocab_size"],
        max_length=fields["max_position_embeddings"],
        type_vocab_size=fields["type_vocab_size"],
        dropout=fields["hidden_dropout_prob"],
        attention_dropout=fields["attention_probs_dropout_prob"],
        activation=activation(fields["hidden_act"]),
        epsilon=fields["layer_norm_eps"],
        pooler=fields["add_pooling_layer"],
    )
    return with_heads(config, heads)


def to_hf(config: TransformerConfig) -> dict[str, Any]:
    """The fields of ``config.json``."""
    block = config.blocks[0]
    mlp = part(block.feed_forward, MLPConfig)
    positions = part(config.positions, LearnedPositions)
    inputs = part(config.inputs, TokenInputs)
    return common(config) | {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.d_model,
        "num_attention_heads": block.attention.num_heads,
        "intermediate_size": mlp.d_ff,
        "max_position_embeddings": positions.num,
        "type_vocab_size": inputs.type_vocab_size,
        "hidden_dropout_prob": block.dropout,
        "attention_probs_dropout_prob": block.attention.dropout,
        "hidden_act": their_activation(mlp.activation),
        "layer_norm_eps": block.norm.epsilon,
        "add_pooling_layer": config.pooler,
    }


def architecture(heads: Heads) -> str:
    """The class in transformers that has these heads."""
    names = tuple(head.name for head in heads)
    pooled = dict.fromkeys(("nsp", "classes", "choice"), ("pooled", True))
    check_classifiers(heads, **pooled, token_classes=("none", True), span=("none", True))
    if names not in ARCHITECTURES:
        raise ValueError(
            f"transformers has no BERT with the heads {list(names)}; it has {list(ARCHITECTURES)}"
        )
    return f"Bert{ARCHITECTURES[names]}"


BERT = Family(
    model_type="bert",
    class_name="Bert",
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
        linear("classifier", "heads.token_classes.dense"),
        linear("classifier", "heads.choice.dense"),
        linear("qa_outputs", "heads.span.dense"),
    ),
    tied={
        "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    ignored=(r"embeddings\.position_ids",),
    # The files that came from TensorFlow.
    aliases=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    defaults={
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "tie_word_embeddings": True,
    },
    from_hf=from_hf,
    to_hf=to_hf,
    find_heads=find_heads,
    architecture=architecture,
)
