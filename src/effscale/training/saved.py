"""Restore configs from the JSON of a run folder."""

import dataclasses
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from effscale.options import did_you_mean

Config = TypeVar("Config")


def config_from_json(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Restore a config dataclass from ``config.json`` or from a checkpoint.

    Missing fields keep their default, so a run from before a field was added can still be read.

    Args:
        cls: The dataclass; its fields may be dataclasses, tuples, paths, unions and plain values.
        values: Its fields as JSON values.

    Returns:
        The config, checked like any other.

    Raises:
        ValueError: A field is unknown, or a value does not have the type of its field.

    Example:
        >>> from effscale.training import AdamWConfig
        >>> config_from_json(AdamWConfig, {"b1": 0.8})
        AdamWConfig(b1=0.8, b2=0.95, eps=1e-08, weight_decay=0.1)
    """
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise ValueError(f"{cls.__name__} has no field {name!r}: {did_you_mean(name, hints)}")
    made = {name: _value(hints[name], value) for name, value in values.items()}
    try:
        return cls(**made)
    except TypeError as error:
        raise ValueError(
            f"{cls.__name__} cannot be created from {dict(values)}: {error}"
        ) from error


def _value(hint: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _member(arguments, value)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return config_from_json(typing.cast(Any, hint), value)
    if origin is tuple and isinstance(value, list):
        if arguments[-1] is Ellipsis:
            return tuple(_value(arguments[0], item) for item in value)
        return tuple(_value(one, item) for one, item in zip(arguments, value, strict=True))
    if hint is pathlib.Path and isinstance(value, str):
        return pathlib.Path(value)
    if origin is typing.Literal and value in arguments:
        return value
    if hint is float and isinstance(value, int):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint):
        return value
    raise ValueError(f"{value!r} is not of type {getattr(hint, '__name__', hint)}")


def _member(arguments: tuple[Any, ...], value: Any) -> Any:
    """Convert ``value`` to the first member of a union that it matches."""
    reasons = []
    for argument in arguments:
        try:
            return _value(argument, value)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError("; ".join(reasons))
