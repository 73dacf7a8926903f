"""What the loader and the writer need to know of a family of models."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from effscale.interop.families.fields import Field, Json, arguments, refuse, written
from effscale.interop.foreign import Fields, reading, shown
from effscale.interop.plan import Slot
from effscale.interop.table import Rule
from effscale.interop.tensors import FolderError, MixedTensors, TensorInfo
from effscale.models import ClassHead, HeadConfig, LMHead, MLPConfig, TransformerConfig

Heads = tuple[HeadConfig, ...]

# DeepSpeed-Chat keeps a reward model's trunk under the first of these, and did under the second.
WRAPPERS = r"^(module\.)?((rwtransformer|rwtranrsformer)\.)?"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A family: one table of the fields of its config, and one of its tensors.

    Attributes:
        model_type: As in ``config.json``.
        class_name: What the names of its classes in transformers begin with.
        make: Its function in ``effscale.models.families``.
        fields: The table of the fields of ``config.json``.
        only: Further fields, with the one value that each may have.
        read: Arguments of ``make`` that the table does not give, or gives otherwise, from ``config.json`` with defaults
            filled in.
        write: Fields that the table does not write, from a config.
        prefix: What the trunk's names begin with in a file of a model with a head.
        trunk: The table of the trunk, with names as in a file of the bare trunk.
        heads: The table of the heads.
        tied: Names that repeat another tensor, and that tensor's name.
        prefixes: By class, that prefix where it is another.
        ignored: Regular expressions of names that hold nothing to load, such as buffers of masks.
        in_memory: Modules of the table that have another name in memory, from transformers 5 on, and that name.
        aliases: Substitutions (pattern, replacement) from the names in files of old to the table's.
        find_heads: The heads, from ``config.json`` and the tensors by their canonical names.
        architecture: The class in transformers that has these heads; a ValueError where none has.
        feed_forwards: Kinds of feed-forward that its layers have.
        plain: A config without what has no part in a model's outputs, beyond dropout, which configs are compared without.
        split: Tensors by their canonical names, with one each where a tensor in memory holds those of several names.
    """

    model_type: str
    class_name: str
    make: Callable[..., TransformerConfig]
    fields: tuple[Field, ...]
    only: Json = dataclasses.field(default_factory=dict)
    read: Callable[[Json], dict[str, Any]] = lambda fields: {}
    write: Callable[[TransformerConfig], dict[str, Any]] = lambda config: {}
    prefix: str
    trunk: tuple[Rule, ...]
    heads: tuple[Rule, ...]
    find_heads: Callable[[Json, Mapping[str, TensorInfo]], Heads]
    architecture: Callable[[Heads], str]
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prefixes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    in_memory: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aliases: tuple[tuple[str, str], ...] = ()
    feed_forwards: tuple[type, ...] = (MLPConfig,)
    plain: Callable[[TransformerConfig], TransformerConfig] = lambda config: config
    split: Callable[[MixedTensors], MixedTensors] = lambda tensors: tensors

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

    @property
    def defaults(self) -> dict[str, Any]:
        """Fields of ``config.json`` that may be absent, with what they then are."""
        return {row.name: row.default for row in self.fields}

    def config(self, fields: Json, tensors: Mapping[str, TensorInfo]) -> TransformerConfig:
        """Our config, from ``config.json`` and the tensors by their canonical names."""
        fields = {**self.defaults, **fields}
        fields |= {row.name: row.checked(fields) for row in self.fields}
        with reading("config.json describes a model that cannot be"):
            return self.from_hf(fields, self.find_heads(fields, tensors))

    def from_hf(self, fields: Json, heads: Heads) -> TransformerConfig:
        """Our config, from ``config.json`` with defaults filled in and the heads."""
        refuse(fields, **self.only)
        more = self.read(fields)
        return dataclasses.replace(self.make(**arguments(self.fields, fields) | more), heads=heads)

    def to_hf(self, config: TransformerConfig) -> dict[str, Any]:
        """The fields of ``config.json``, from a config.

        Raises:
            ValueError: If the config has another kind of part than the family.
        """
        return fields_of_heads(config.heads) | self.write(config) | written(self.fields, config)


def _renamed(name: str, old: str, new: str) -> str:
    """A tensor's name where its module is called ``new`` in place of ``old``; ``{}`` in both is the layer's number."""
    found = re.match(re.escape(old).replace(r"\{\}", r"(\d+)") + r"(?=\.)", name)
    return name if found is None else new.format(*found.groups()) + name[found.end() :]


def named_class(fields: Json) -> str:
    """The class in transformers that ``config.json`` names; an empty string where it names none."""
    names = fields.get("architectures") or [None]
    if not isinstance(names, list) or not isinstance(names[0], str | None):
        raise FolderError(f"config.json has architectures={shown(names)}: must be a list of names")
    return names[0] or ""


def fields_of_heads(heads: Heads) -> dict[str, Any]:
    """Fields that tell whether the vocabulary is tied, the number of classes, and the dropout before them."""
    fields: dict[str, Any] = {}
    for head in heads:
        if isinstance(head, LMHead):
            fields["tie_word_embeddings"] = head.tied
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
