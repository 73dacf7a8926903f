"""One table per family: each field of ``config.json`` and the argument of ours that it is, read in both directions.

A ``Field`` is a row. Forwards it gives an argument of the family's function in ``effscale.models.families``;
backwards it is written from the place where a config keeps that argument's value, see ``PLACES``.

Example:
    >>> from effscale.models import preset
    >>> table = (Field("n_layer", 12, "num_layers"), activation("activation_function", "gelu_new"))
    >>> arguments(table, {"n_layer": 2, "activation_function": "gelu_new"})
    {'num_layers': 2, 'activation': 'gelu_tanh'}
    >>> written(table, preset("gpt2-xl"))
    {'n_layer': 48, 'activation_function': 'gelu_new'}
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from effscale.interop.families.activations import our_activation, their_activation
from effscale.interop.foreign import Fields, shown
from effscale.interop.tensors import FolderError
from effscale.models import TransformerConfig

Json = Mapping[str, Any]

PLACES = {
    "num_layers": "num_layers",
    "d_model": "d_model",
    "d_ff": "blocks.0.feed_forward.d_ff",
    "num_heads": "blocks.0.attention.num_heads",
    "num_kv_heads": "blocks.0.attention.kv_heads",
    "vocab_size": "inputs.vocab_size",
    "type_vocab_size": "inputs.type_vocab_size",
    "d_embed": "hidden_width",
    "image_size": "inputs.image_size",
    "patch_size": "inputs.patch_size",
    "channels": "inputs.channels",
    "max_length": "positions.num",
    "rotary_dim": "positions.dim",
    "bias": "blocks.0.attention.bias",
    "qkv_bias": "blocks.0.attention.bias",
    "window": "blocks.0.attention.window",
    "mlp_bias": "blocks.0.feed_forward.bias",
    "activation": "blocks.0.feed_forward.activation",
    "epsilon": "blocks.0.norm.epsilon",
    "norm_affine": "blocks.0.norm.scale",
    "dropout": "blocks.0.dropout",
    "attention_dropout": "blocks.0.attention.dropout",
    "embed_dropout": "inputs.dropout",
    "pooler": "pooler",
    "pooler_activation": "pooler_activation",
}
"""Arguments of the families' functions, and the paths where their values are found again in a config."""


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of ``config.json`` and the argument of ours that it is.

    Attributes:
        name: In ``config.json``.
        default: What it is where it is absent. It has the type of the field; None stands for a whole number that need
            not be given.
        argument: Of the family's function. None: only the heads or the family's ``read`` take the field, and the table does
            not write it.
        read: The argument, from the field's value; as a rule they are the same.
        write: The field's value, from a config; None: what lies in the argument's place.
    """

    name: str
    default: Any
    argument: str | None = None
    _: dataclasses.KW_ONLY
    read: Callable[[Any], Any] = lambda value: value
    write: Callable[[TransformerConfig], Any] | None = None

    def checked(self, fields: Json) -> Any:
        """The field's value in a file, if it is of the default's type; null counts as the default of a number with a point.

        Raises:
            FolderError: If it is of another type.
        """
        typed = Fields("config.json", fields)
        match self.default:
            case bool():
                return typed.flag(self.name)
            case int():
                return typed.whole(self.name)
            case float():
                return typed.number(self.name, self.default)
            case str():
                return typed.text(self.name)
        return typed.whole(self.name, None)


class Nullable(Field):
    """A whole number that may be null, where absent is something else than null."""

    def checked(self, fields: Json) -> int | None:
        """The number, or None."""
        return Fields("config.json", fields).whole(self.name, None)


def arguments(table: Sequence[Field], fields: Json) -> dict[str, Any]:
    """The arguments that a table gives, from ``config.json`` with defaults filled in."""
    return {row.argument: row.read(fields[row.name]) for row in table if row.argument}


def written(table: Sequence[Field], config: TransformerConfig) -> dict[str, Any]:
    """The fields that a table writes.

    Raises:
        ValueError: If the config has nothing for one of them.
    """
    return {
        row.name: row.write(config) if row.write else found(config, row.argument)
        for row in table
        if row.argument
    }


def found(config: TransformerConfig, argument: str) -> Any:
    """The value of an argument, from its place in a config.

    Raises:
        ValueError: If the config has a part of another kind there.
    """
    value: Any = config
    try:
        for name in PLACES[argument].split("."):
            value = value[int(name)] if name.isdecimal() else getattr(value, name)
    except AttributeError as error:
        raise ValueError(f"the config has no {argument}: {error}") from error
    return value


def activation(name: str, default: str, argument: str = "activation") -> Field:
    """A field that names an activation."""
    write = lambda config: their_activation(found(config, argument))
    return Field(name, default, argument, read=our_activation, write=write)


def refuse(fields: Json, **only: Any) -> None:
    """Raises unless each named field, where it is there, has the value that we can compute (or is null)."""
    for name, value in only.items():
        given = fields.get(name, value)
        if given is not None and given != value:
            raise FolderError(
                f"config.json has {name}={shown(given)}, and effscale computes only {name}={value!r}"
            )
