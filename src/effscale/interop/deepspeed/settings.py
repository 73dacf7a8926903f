"""Read values of DeepSpeed's JSON configurations: each error names the key with its path, the value and what is valid."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from effscale.options import did_you_mean, is_finite

Block = Mapping[str, Any]


class Part(NamedTuple):
    """A part of ``data_efficiency``: its values, its path, and the block that contains it."""

    values: Block
    where: str
    outside: Block


def part_of_data_efficiency(block: Block, outside: str, name: str, *known: str) -> Part | None:
    """Return the part ``outside.name`` of ``data_efficiency`` if it is enabled.

    DeepSpeed goes by the part's own switch. Those above it can be left out, but not contradict it.

    Args:
        block: ``data_efficiency``.
        outside: The block that contains the part.
        name: The part.
        *known: The other keys of the block that contains it.
    """
    outer, middle = "data_efficiency", f"data_efficiency.{outside}"
    check_keys(block, outer, optional=("enabled", "seed", "data_sampling", "data_routing"))
    between = block.get(outside, {})
    check_keys(between, middle, optional=("enabled", *known, name))
    found, where = between.get(name), f"{middle}.{name}"
    if found is None or not switch(found, where):
        return None
    for path, above in ((outer, block), (middle, between)):
        if not above.get("enabled", True):
            raise ValueError(
                f"{path}.enabled is false, but {where}.enabled, which DeepSpeed uses, is true. Set both to the same value."
            )
    return Part(found, where, between)


def check_keys(
    block: Any, where: str, *, required: Iterable[str] = (), optional: Iterable[str] = ()
) -> None:
    """Raise a ValueError unless ``block``, from JSON, is an object with all required keys and no unknown keys."""
    if not isinstance(block, Mapping):
        raise ValueError(f"{where} must be an object of keys and values, got {block!r}")
    known = [*required, *optional]
    for key in block:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}: {did_you_mean(str(key), known)}")
    if missing := [key for key in required if key not in block]:
        raise ValueError(f"{where}: needs {', '.join(missing)}")


def switch(block: Any, where: str) -> bool:
    """Return whether a block of JSON is ``enabled``; the key is required."""
    check_keys(block, where, required=("enabled",), optional=block)
    if not isinstance(block["enabled"], bool):
        raise ValueError(f"{where}.enabled must be true or false, got {block['enabled']!r}")
    return block["enabled"]


def whole_number(value: Any, where: str) -> int:
    """Return a whole number from JSON, which does not distinguish integers from other numbers: 1e5 is read as a float."""
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not is_whole:
        raise ValueError(f"{where} must be a whole number, got {value!r}")
    return int(value)


def whole_numbers(value: Any, where: str) -> tuple[int, ...]:
    """Return a list of whole numbers."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where} must be a list, got {value!r}")
    return tuple(whole_number(one, where) for one in value)


def named(where: str, kind: Any, **fields: Any) -> Any:
    """Build an object; its errors begin with the place in the configuration."""
    try:
        return kind(**fields)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None


def strings(value: Any, where: str) -> list[str]:
    """Return a list of expressions; a single string counts as a list of one."""
    values = [value] if isinstance(value, str) else value
    is_list = isinstance(values, list | tuple) and all(isinstance(one, str) for one in values)
    if not is_list or not values:
        raise ValueError(f"{where} must be a list of expressions, got {value!r}")
    return list(values)


def flag(block: Block, key: str, where: str) -> bool:
    """Return a boolean; false by default."""
    value = block.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"{where}.{key} must be true or false, got {value!r}")
    return value


def one_of(block: Block, key: str, names: tuple[str, ...], where: str) -> Any:
    """Return one of ``names``; the first one by default."""
    value = block.get(key, names[0])
    if value not in names:
        raise ValueError(f"{where}.{key}={value!r}: {did_you_mean(str(value), names)}")
    return value


def number(block: Block, key: str, default: Any, where: str) -> float:
    """Return a finite number."""
    value = block.get(key, default)
    if not is_finite(value):
        place = f"{where}.{key}".removeprefix(".")
        raise ValueError(f"{place} must be a number, got {value!r}")
    return value
