"""What the loader and the writer need to know of a family of models."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from effscale.interop.foreign import Fields, reading, shown
from effscale.interop.plan import Slot
from effscale.interop.table import Rule
from effscale.interop.tensors import FolderError, TensorInfo
from effscale.models import ClassHead, HeadConfig, LMHead, TokenInputs, TransformerConfig

Json = Mapping[str, Any]
Heads = tuple[HeadConfig, ...]
Part = TypeVar("Part")

# DeepSpeed-Chat keeps a reward model's trunk under the first of these, and did under the second.
WRAPPERS = r"^(module\.)?((rwtransformer|rwtranrsformer)\.)?"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A family: its config in both directions, and its table of tensors.

    Attributes:
        model_type: As in ``config.json``.
        class_name: What the names of its classes in transformers begin with.
        prefix: What the trunk's names begin with in a file of a model with a head.
        trunk: The table of the trunk, with names as in a file of the bare trunk.
        heads: The table of the heads.
        tied: Names that repeat another tensor, and that tensor's name.
        prefixes: By class, that prefix where it is another.
        ignored: Regular expressions of names that hold nothing to load, such as buffers of masks.
        in_memory: Modules of the table that have another name in memory, from transformers 5 on, and that name.
        aliases: Substitutions (pattern, replacement) from the names in files of old to the table's.
        defaults: Fields of ``config.json`` that may be absent, with what they then are; their types are the fields'
            types, and None stands for a whole number that need not be given.
        from_hf: The config, from ``config.json`` with defaults filled in and the heads.
        to_hf: The fields of ``config.json``, from a config.
        find_heads: The heads, from ``config.json`` and the tensors by their canonical names.
        architecture: The class in transformers that has these heads; a ValueError where none has.
    """

    model_type: str
    class_name: str
    prefix: str
    trunk: tuple[Rule, ...]
    heads: tuple[Rule, ...]
    defaults: Json
    from_hf: Callable[[Json, Heads], TransformerConfig]
    to_hf: Callable[[TransformerConfig], dict[str, Any]]
    find_heads: Callable[[Json, Mapping[str, TensorInfo]], Heads]
    architecture: Callable[[Heads], str]
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prefixes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    in_memory: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aliases: tuple[tuple[str, str], ...] = ()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The whole table."""
        return self.trunk + self.heads

    def prefix_with(self, heads: Heads) -> str:
        """What the trunk's names begin with in a file of a model with these heads."""
        return self.prefixes.get(self.architecture(heads), self.prefix) if heads else ""

    def canonical(self, name: str) -> str:
        """A tensor's name in the table, from any of those it is known under."""
        name = re.sub(WRAPPERS, "", name)
        for pattern, replacement in self.aliases:
            name = re.sub(pattern, replacement, name)
        for prefix in {self.prefix, *self.prefixes.values()}:
            name = name.removeprefix(prefix)
        for table, memory in self.in_memory.items():
            name = _renamed(name, memory, table)
        return name

    def stored_name(self, slot: Slot, heads: Heads) -> str:
        """A tensor's name in a file of a model with these heads; a reward is a classifier's score there."""
        if slot.rule in self.trunk:
            return self.prefix_with(heads) + slot.name
        return "score.weight" if slot.name == "v_head.weight" else slot.name

    def memory_name(self, stored: str) -> str:
        """A tensor's name in transformers' model in memory, from that in files.

        Example:
            >>> from effscale.interop.families import VIT
            >>> VIT.memory_name("vit.encoder.layer.3.attention.output.dense.weight")
            'vit.layers.3.attention.o_proj.weight'
        """
        bare = stored.removeprefix(self.prefix)
        prefix = stored.removesuffix(bare)
        for table, memory in self.in_memory.items():
            bare = _renamed(bare, table, memory)
        return prefix + bare

    def config(self, fields: Json, tensors: Mapping[str, TensorInfo]) -> TransformerConfig:
        """Our config, from ``config.json`` and the tensors by their canonical names."""
        fields = {**self.defaults, **fields}
        for name, default in self.defaults.items():
            fields[name] = checked(fields, name, default)
        with reading("config.json describes a model that cannot be"):
            return self.from_hf(fields, self.find_heads(fields, tensors))


def _renamed(name: str, old: str, new: str) -> str:
    """A tensor's name where its module is called ``new`` in place of ``old``; ``{}`` in both is the layer's number."""
    found = re.match(re.escape(old).replace(r"\{\}", r"(\d+)") + r"(?=\.)", name)
    return name if found is None else new.format(*found.groups()) + name[found.end() :]


def part(value: Any, kind: type[Part]) -> Part:
    """A part of a config that a family has in one kind only.

    Raises:
        ValueError: If it is of another.
    """
    if not isinstance(value, kind):
        raise ValueError(f"a {type(value).__name__} stands where the family has a {kind.__name__}")
    return value


def checked(fields: Json, name: str, default: Any) -> Any:
    """A field's value, if it is of the kind that its default is; a number with a point that is null is the default.

    Raises:
        FolderError: If it is of another kind.
    """
    typed = Fields("config.json", fields)
    if name in ("image_size", "patch_size"):
        return square(fields, name)
    match default:
        case bool():
            return typed.flag(name)
        case float():
            return typed.number(name, default)
        case str():
            return typed.text(name)
    return typed.whole(name, *(() if isinstance(default, int) else (None,)))


def square(fields: Json, name: str) -> int:
    """A size in pixels, as one number or as two that are the same."""
    given = fields[name]
    pair = given if isinstance(given, list) and len(given) == 2 else [given]
    sizes = {Fields("config.json", {name: size}).whole(name) for size in pair}
    if len(sizes) != 1:
        raise FolderError(f"config.json has {name}={shown(given)}; effscale takes squares only")
    return sizes.pop()


def named_class(fields: Json) -> str:
    """The class in transformers that ``config.json`` names; an empty string where it names none."""
    names = fields.get("architectures") or [None]
    if not isinstance(names, list) or not isinstance(names[0], str | None):
        raise FolderError(f"config.json has architectures={shown(names)}: must be a list of names")
    return names[0] or ""


def with_heads(config: TransformerConfig, heads: Heads) -> TransformerConfig:
    """The config with these heads in place of its own."""
    return dataclasses.replace(config, heads=heads)


def common(config: TransformerConfig) -> dict[str, Any]:
    """Fields that every language model has under the same name, and what heads add."""
    fields: dict[str, Any] = {"vocab_size": part(config.inputs, TokenInputs).vocab_size}
    for head in config.heads:
        if isinstance(head, LMHead):
            fields["tie_word_embeddings"] = head.tied
    return fields | labels(config)


def labels(config: TransformerConfig) -> dict[str, Any]:
    """Fields that tell the number of classes, and the dropout before them."""
    fields: dict[str, Any] = {}
    for head in config.heads:
        if isinstance(head, ClassHead) and head.name not in ("nsp", "span"):
            names = [f"LABEL_{i}" for i in range(head.num_classes)]
            fields["id2label"] = {str(i): name for i, name in enumerate(names)}
            fields["label2id"] = {name: i for i, name in enumerate(names)}
            if head.name == "token_classes" or head.pool == "pooled":
                fields["classifier_dropout"] = head.dropout
    return fields


def classifier_dropout(fields: Json, otherwise: str) -> float:
    """Dropout before a classifier, or the one of another name where there is none of its own."""
    typed = Fields("config.json", fields)
    return typed.number("classifier_dropout", typed.number(otherwise, 0.1))


def check_classifiers(heads: Heads, **wanted: tuple[str, bool]) -> None:
    """Raises unless each classifier takes the vector, and has the bias or none, that the family's of this name does."""
    for head in heads:
        if isinstance(head, ClassHead) and head.name in wanted:
            for name, theirs in zip(("pool", "bias"), wanted[head.name], strict=True):
                ours = getattr(head, name)
                if ours != theirs:
                    raise ValueError(
                        f"the head {head.name!r} has {name}={ours!r}, and transformers' has {theirs!r}"
                    )


def refuse(fields: Json, **only: Any) -> None:
    """Raises unless each named field, where it is there, has the value that we can compute (or is null)."""
    for name, value in only.items():
        given = fields.get(name, value)
        if given is not None and given != value:
            raise FolderError(
                f"config.json has {name}={shown(given)}, and effscale computes only {name}={value!r}"
            )


# Names of activations in transformers; the first of several that are the same function is the one written.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_fast",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "relu6": "relu6",
    "leaky_relu": "leaky_relu",
    "silu": "silu",
    "swish": "silu",
    "mish": "mish",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "linear": "linear",
}


def activation(name: str) -> Any:
    """Our name of an activation."""
    if name not in ACTIVATIONS:
        raise FolderError(
            f"config.json asks for the activation {shown(name)}; effscale has {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def their_activation(name: str) -> str:
    """Their name of an activation."""
    for theirs, ours in ACTIVATIONS.items():
        if ours == name:
            return theirs
    raise ValueError(f"transformers has no activation like {name!r}")
