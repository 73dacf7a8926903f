"""Heads of language models: next token, class of a text or a token, span of an answer, value of a reward model."""

from collections.abc import Mapping

from effscale.interop.families.family import (
    Heads,
    check_classifiers,
    classifier_dropout,
    named_class,
)
from effscale.interop.families.fields import Json
from effscale.interop.table import Rule, linear, rows
from effscale.interop.tensors import TensorInfo
from effscale.models import ClassHead, LMHead

TABLE = rows(
    linear("lm_head", "heads.lm.project"),
    linear("score", "heads.classes.dense"),
    linear("score", "heads.score.dense"),
    linear("qa_outputs", "heads.span.dense"),
    # DeepSpeed-Chat's reward model and critic: one value per token.
    (Rule("v_head.weight", "heads.value.dense.kernel", "o i -> i o"),),
)
# A class for each token, which Llama also calls `score`.
CLASSIFIER = linear("classifier", "heads.token_classes.dense")


def find(fields: Json, tensors: Mapping[str, TensorInfo], *, lm_bias: bool = False) -> Heads:
    """Return the heads in the file or, if there are none, the next-token head unless config.json names the bare trunk."""
    architecture = named_class(fields)
    if "v_head.weight" in tensors:
        return (ClassHead(name="value", num_classes=1, pool="none", bias=False),)
    for name in ("score", "classifier"):
        if f"{name}.weight" in tensors:
            each_token = architecture.endswith("ForTokenClassification") or name == "classifier"
            return (
                ClassHead(
                    name="token_classes" if each_token else "classes",
                    num_classes=tensors[f"{name}.weight"].shape[0],
                    pool="none" if each_token else "last",
                    bias=f"{name}.bias" in tensors,
                    dropout=classifier_dropout(fields, "hidden_dropout") if each_token else 0.0,
                ),
            )
    if "qa_outputs.weight" in tensors:
        return (ClassHead(name="span", num_classes=2, pool="none"),)
    if architecture.endswith("Model") and not architecture.endswith("LMHeadModel"):
        return ()
    return (LMHead(tied=bool(fields["tie_word_embeddings"]), bias=lm_bias),)


def architecture(class_name: str, *, lm: str = "ForCausalLM", token_classes: bool = True):
    """Return a function from heads to the class that has them; not all families have one for token classes."""

    def name(heads: Heads) -> str:
        if not heads:
            return f"{class_name}Model"
        check_classifiers(
            heads,
            classes=("last", False),
            score=("last", False),
            token_classes=("none", True),
            span=("none", True),
            value=("none", False),
        )
        if len(heads) == 1:
            (head,) = heads
            if isinstance(head, LMHead) and head.name == "lm":
                return class_name + lm
            if isinstance(head, ClassHead):
                if head.name in ("classes", "score", "value"):
                    return f"{class_name}ForSequenceClassification"
                if head.name == "span":
                    return f"{class_name}ForQuestionAnswering"
                if head.name == "token_classes" and token_classes:
                    return f"{class_name}ForTokenClassification"
        raise ValueError(
            f"transformers has no {class_name} with the heads {[head.name for head in heads]}"
        )

    return name
