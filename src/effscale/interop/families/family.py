"""What the loader and the writer need to know about a family of models."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from effscale.interop.families.fields import Field, Json, arguments, refuse, written
from effscale.interop.foreign import Fields, reading, shown
from effscale.interop.plan import Slot
from effscale.interop.table import Rule
from effscale.interop.tensors import FolderError, MixedTensors, TensorInfo
from effscale.models import ClassHead, LMHead, MLPConfig, TransformerConfig
from effscale.models.config import HeadConfig

Heads = tuple[HeadConfig, ...]

# DeepSpeed-Chat stores a reward model's trunk under the first of these, and formerly under the second.
WRAPPERS = r"^(module\.)?((rwtransformer|rwtranrsformer)\.)?"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models, with a table of the fields of its config and a table of its tensors.

    Attributes:
        model_type: The name in ``config.json``.
        class_name: Common prefix of the names of its classes in transformers.
        make: Its function in ``effscale.models.families``.
        fields: The table of the fields of ``config.json``.
        only: Additional fields, each with the only value that is supported.
        read: Arguments of ``make`` that the table does not provide, or that override it, from ``config.json`` with defaults
            filled in.
        write: Fields that the table does not write, from a config.
        prefix: Prefix of the trunk's names in a file of a model with a head.
        trunk: The table of the trunk, with names as in a file of the bare trunk.
        heads: The table of the heads.
        tied: Names that repeat another tensor, and the name of that tensor.
        prefixes: The prefixes of classes that use another one.
        ignored: Regular expressions of names to ignore, such as buffers of masks.
        in_memory: Modules of the table that have another name in memory, from transformers 5 on, and that name.
        aliases: Substitutions (pattern, replacement) from the names in old files to the table's.
        find_heads: Returns the heads, from ``config.json`` and the tensors by their canonical names.
        architecture: Returns the class in transformers that has these heads; raises a ValueError if no class has them.
        feed_forwards: Kinds of feed-forward that its layers support.
        plain: Returns a config without parts that do not affect a model's outputs, for comparing configs. Dropout is always
            ignored.
        split: Splits tensors that are fused in memory into one tensor per canonical name.
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
        """All rows of the table."""
        return self.trunk + self.heads

    def prefix_with(self, heads: Heads) -> str:
        """Return the prefix of the trunk's names in a file of a model with these heads."""
        return self.prefixes.get(self.architecture(heads), self.prefix) if heads else ""

    def canonical(self, name: str) -> str:
        """Return a tensor's name in the table, from any of its known names."""
        name = re.sub(WRAPPERS, "", name)
        for pattern, replacement in self.aliases:
            name = re.sub(pattern, replacement, name)
        for prefix in {self.prefix, *self.prefixes.values()}:
            name = name.removeprefix(prefix)
        for table, memory in self.in_memory.items():
            name = _renamed(name, memory, table)
        return name

    def stored_name(self, slot: Slot, heads: Heads) -> str:
        """Return a tensor's name in a file of a model with these heads; a reward is stored as a classifier's score."""
        if slot.rule in self.trunk:
            return self.prefix_with(heads) + slot.name
        return "score.weight" if slot.name == "v_head.weight" else slot.name

    def memory_name(self, stored: str) -> str:
        """Return a tensor's name in transformers' model in memory, from its name in files.

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
        """The optional fields of ``config.json``, with their defaults."""
        return {row.name: row.default for row in self.fields}

    def config(self, fields: Json, tensors: Mapping[str, TensorInfo]) -> TransformerConfig:
        """Return effscale's config, from ``config.json`` and the tensors by their canonical names."""
        fields = {**self.defaults, **fields}
        fields |= {row.name: row.checked(fields) for row in self.fields}
        with reading("config.json describes an invalid model"):
            return self.from_hf(fields, self.find_heads(fields, tensors))

    def from_hf(self, fields: Json, heads: Heads) -> TransformerConfig:
        """Return effscale's config, from ``config.json`` with defaults filled in and the heads."""
        refuse(fields, **self.only)
        more = self.read(fields)
        return dataclasses.replace(self.make(**arguments(self.fields, fields) | more), heads=heads)

    def to_hf(self, config: TransformerConfig) -> dict[str, Any]:
        """Return the fields of ``config.json`` for a config.

        Raises:
            ValueError: A part of the config is of a kind that the family does not support.
        """
        return fields_of_heads(config.heads) | self.write(config) | written(self.fields, config)


def _renamed(name: str, old: str, new: str) -> str:
    """Return a tensor's name with its module renamed from ``old`` to ``new``; ``{}`` in both is the layer number."""
    found = re.match(re.escape(old).replace(r"\{\}", r"(\d+)") + r"(?=\.)", name)
    return name if found is None else new.format(*found.groups()) + name[found.end() :]


def named_class(fields: Json) -> str:
    """Return the class in transformers that ``config.json`` names, or an empty string."""
    names = fields.get("architectures") or [None]
    if not isinstance(names, list) or not isinstance(names[0], str | None):
        raise FolderError(f"config.json: architectures must be a list of names, got {shown(names)}")
    return names[0] or ""


def fields_of_heads(heads: Heads) -> dict[str, Any]:
    """Return the fields for weight tying, the number of classes, and the dropout before the heads."""
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
    """Return the dropout before a classifier, by default that of the field ``otherwise``."""
    typed = Fields("config.json", fields)
    return typed.number("classifier_dropout", typed.number(otherwise, 0.1))


def check_classifiers(heads: Heads, **wanted: Sequence[Any]) -> None:
    """Raise unless each classifier pools, and has a bias or not, like the family's classifier of this name."""
    for head in heads:
        if isinstance(head, ClassHead) and head.name in wanted:
            for name, theirs in zip(("pool", "bias"), wanted[head.name], strict=True):
                ours = getattr(head, name)
                if ours != theirs:
                    raise ValueError(
                        f"the head {head.name!r} must have {name}={theirs!r}, as in transformers, got {ours!r}"
                    )
