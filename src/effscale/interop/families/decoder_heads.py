"""Heads of language models: next token, class of a text or a token, span of an answer, value of a reward model."""

from collections.abc import Collection, Mapping

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


CLASSES = {
    "classes": ("ForSequenceClassification", "last", False),
    "score": ("ForSequenceClassification", "last", False),
    "value": ("ForSequenceClassification", "none", False),
    "span": ("ForQuestionAnswering", "none", True),
    "token_classes": ("ForTokenClassification", "none", True),
}
"""For each classifier, its class in transformers, what it pools, and whether it has a bias."""


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


def architecture(class_name: str, *, lm: str = "ForCausalLM", lacks: Collection[str] = ()):
    """Return a function from heads to the class that has them; ``lacks`` are the heads for which the family has no class."""

    def name(heads: Heads) -> str:
        if not heads:
            return f"{class_name}Model"
        check_classifiers(heads, **{name: form for name, (_, *form) in CLASSES.items()})
        head, *others = heads
        if not others and isinstance(head, LMHead) and head.name == "lm":
            return class_name + lm
        known = isinstance(head, ClassHead) and head.name in CLASSES.keys() - lacks
        if others or not known:
            raise ValueError(
                f"transformers has no {class_name} with the heads {[head.name for head in heads]}"
            )
        return class_name + CLASSES[head.name][0]

    return name
