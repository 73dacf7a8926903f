"""DeepSpeed's JSON configurations, read by tables: what each key holds, its default, and what is ignored or refused.

An error names the key by its path in the JSON, its value and what is valid.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from effscale.options import checked, did_you_mean

Block = Mapping[str, Any]


class Key(NamedTuple):
    """A row of a table: a key of a JSON object.

    Attributes:
        kind: What it holds: an annotation as in ``effscale.options``, bounds included, or the table of an object.
        default: The value if it is absent; ``...`` if it is required.
        advice: What to do about a value that is refused.
    """

    kind: Any
    default: Any = ...
    advice: str = ""


Table = Mapping[str, Key]
IGNORED = Key(Any, None)
SWITCH = Key(bool)

DATA_EFFICIENCY: Table = {
    "enabled": Key(bool, True),
    "seed": Key(int, 1234),
    "data_sampling": Key(
        {
            "enabled": Key(bool, True),
            "num_epochs": Key(int, 1000),
            "num_workers": IGNORED,
            "pin_memory": IGNORED,
            "curriculum_learning": Key(Any, None),
        },
        {},
    ),
    "data_routing": Key({"enabled": Key(bool, True), "random_ltd": Key(Any, None)}, {}),
}


def read(block: Any, where: str, table: Table, *, others: bool = False) -> dict[str, Any]:
    """Read an object of a configuration.

    Args:
        block: The object, from JSON.
        where: Its path in the configuration; empty for the whole configuration.
        table: Its keys.
        others: Whether it may have other keys, which are not read.

    Returns:
        The value of each key of the table, or its default. JSON does not distinguish integers from other numbers, so 1e5 is one.

    Raises:
        ValueError: The block is not an object, a key is unknown or missing, or a value is not of its kind.

    Example:
        >>> read({"freeze_step": 1e5}, "optimizer.params", {"freeze_step": Key(int), "eps": Key(float, 1e-8)})
        {'freeze_step': 100000, 'eps': 1e-08}
    """
    place = where or "the configuration"
    if not isinstance(block, Mapping):
        raise ValueError(f"{place} must be an object of keys and values, got {block!r}")
    for name in block:
        if name not in table and not others:
            raise ValueError(f"{place}: unknown key {name!r}: {did_you_mean(str(name), table)}")
    if missing := [name for name, key in table.items() if key.default is ... and name not in block]:
        raise ValueError(f"{place}: needs {', '.join(missing)}")
    return {name: _value(block, where, name, key) for name, key in table.items()}


def is_enabled(block: Any, where: str, default: Any = ...) -> bool:
    """Return whether an object is ``enabled``; the rest of it is not read."""
    return read(block, where, {"enabled": Key(bool, default)}, others=True)["enabled"]


def _value(block: Block, where: str, name: str, key: Key) -> Any:
    value, path = block.get(name, key.default), f"{where}.{name}".removeprefix(".")
    if isinstance(key.kind, Mapping):
        return read(value, path, key.kind)
    if name not in block:
        return value
    try:
        return checked(path, _with_integers(value), key.kind)
    except ValueError as error:
        raise ValueError(f"{error}. {key.advice}".removesuffix(". ")) from None


def _with_integers(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_integers(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def part_of_data_efficiency(block: Any, outside: str, name: str) -> tuple[Any, str, Block] | None:
    """Return the part ``outside.name`` of ``data_efficiency`` and its path if it is enabled, and the values of ``data_efficiency``.

    DeepSpeed goes by the part's own switch. Those above it can be left out, but not contradict it.
    """
    outer, middle = "data_efficiency", f"data_efficiency.{outside}"
    values = read(block, outer, DATA_EFFICIENCY)
    part, where = values[outside][name], f"{middle}.{name}"
    if part is None or not is_enabled(part, where):
        return None
    for path, above in ((outer, values), (middle, values[outside])):
        if not above["enabled"]:
            raise ValueError(
                f"{path}.enabled is false, but {where}.enabled, which DeepSpeed uses, is true. Set both to the same value."
            )
    return part, where, values


def named(where: str, kind: Any, **fields: Any) -> Any:
    """Build an object; its errors begin with the place in the configuration."""
    try:
        return kind(**fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
