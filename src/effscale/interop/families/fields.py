"""One table per family that maps each field of ``config.json`` to an argument of effscale, in both directions.

A ``Field`` is a row. For reading, it provides an argument of the family's function in ``effscale.models.families``.
For writing, its value is taken from the place in a config that stores the argument; see ``PLACES``.

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
    "residual": "blocks.0.residual",
    "dropout": "blocks.0.dropout",
    "attention_dropout": "blocks.0.attention.dropout",
    "embed_dropout": "inputs.dropout",
    "pooler": "pooler",
    "pooler_activation": "pooler_activation",
}
"""Arguments of the families' functions, and the paths of their values in a config."""


SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads")
GPT_SIZES = ("n_layer", "n_embd", "n_head")
"""Names of the number of layers, the width and the number of heads."""

# Of several names for the same function, the first is written.
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


def our_activation(name: str) -> Any:
    """Return effscale's name of an activation."""
    if name not in ACTIVATIONS:
        raise FolderError(
            f"config.json: the activation must be one of {', '.join(ACTIVATIONS)}, got {shown(name)}"
        )
    return ACTIVATIONS[name]


def their_activation(name: str) -> str:
    """Return transformers' name of an activation."""
    for theirs, ours in ACTIVATIONS.items():
        if ours == name:
            return theirs
    raise ValueError(f"transformers has no activation like {name!r}")


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of ``config.json`` and the corresponding argument in effscale.

    Attributes:
        name: The name in ``config.json``.
        default: The value if the field is absent. It has the type of the field; None stands for an optional whole number.
        argument: The argument of the family's function. None: only the heads or the family's ``read`` use the field, and the
            table does not write it.
        read: Converts the field's value to the argument; by default they are the same.
        write: Computes the field's value from a config; None: the value at the argument's place.
    """

    name: str
    default: Any
    argument: str | None = None
    _: dataclasses.KW_ONLY
    read: Callable[[Any], Any] = lambda value: value
    write: Callable[[TransformerConfig], Any] | None = None

    def checked(self, fields: Json) -> Any:
        """Return the field's value in a file if it has the type of the default; null means the default of a float.

        Raises:
            FolderError: It has another type.
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
    """An optional whole number for which null differs from absent."""

    def checked(self, fields: Json) -> int | None:
        """Return the number, or None."""
        return Fields("config.json", fields).whole(self.name, None)


def arguments(table: Sequence[Field], fields: Json) -> dict[str, Any]:
    """Return the arguments that a table provides, from ``config.json`` with defaults filled in."""
    return {row.argument: row.read(fields[row.name]) for row in table if row.argument}


def written(table: Sequence[Field], config: TransformerConfig) -> dict[str, Any]:
    """Return the fields that a table writes.

    Raises:
        ValueError: The config has no value for one of them.
    """
    return {
        row.name: row.write(config) if row.write else found(config, row.argument)
        for row in table
        if row.argument
    }


def found(config: TransformerConfig, argument: str) -> Any:
    """Return the value of an argument, from its place in a config.

    Raises:
        ValueError: The config has another kind of part at that place.
    """
    value: Any = config
    try:
        for name in PLACES[argument].split("."):
            value = value[int(name)] if name.isdecimal() else getattr(value, name)
    except AttributeError as error:
        raise ValueError(f"the config has no {argument}: {error}") from error
    return value


def activation(name: str, default: str, argument: str = "activation") -> Field:
    """Return a field that names an activation."""
    write = lambda config: their_activation(found(config, argument))
    return Field(name, default, argument, read=our_activation, write=write)


def sizes(
    layers: int, width: int, heads: int, words: int | None = None, names: Sequence[str] = SIZES
) -> tuple[Field, ...]:
    """Return the fields of the numbers of layers and heads, the width, and the size of the vocabulary, with their defaults."""
    vocabulary = () if words is None else (Field("vocab_size", words, "vocab_size"),)
    own = zip(names, (layers, width, heads), ("num_layers", "d_model", "num_heads"), strict=True)
    return (*(Field(*row) for row in own), *vocabulary)


def refuse(fields: Json, **only: Any) -> None:
    """Raise unless each named field is absent, null, or has the only supported value."""
    for name, value in only.items():
        given = fields.get(name, value)
        if given is not None and given != value:
            raise FolderError(
                f"config.json: {name} must be {value!r}, the only supported value, got {shown(given)}"
            )
