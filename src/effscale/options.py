"""Configs that check themselves: the type of a field says what is valid, bounds included.

A config is a frozen dataclass that inherits from ``Options``. When one is made, each field is compared with its
annotation: an integer is not a float, a bool or a text; a number is finite and within its ``Bounds``; a ``Literal`` has
one of its values. What depends on several fields stands in the config's own ``__post_init__``, after that of ``super()``.

Example:
    >>> import dataclasses
    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Warmup(Options):
    ...     kind: Literal["linear", "cosine"] = "linear"
    ...     steps: PositiveInt = 100
    ...     final: Annotated[float, Bounds(at_least=0, below=1)] | None = None
    >>> Warmup(steps=0)
    Traceback (most recent call last):
        ...
    ValueError: Warmup.steps must be at least 1, got 0
    >>> Warmup(kind="cosin")
    Traceback (most recent call last):
        ...
    ValueError: Warmup.kind must be one of 'linear', 'cosine', got 'cosin'; did you mean 'cosine'?
"""

import collections.abc
import dataclasses
import difflib
import functools
import math
import numbers
import types
import typing
from collections.abc import Iterable
from typing import Annotated, Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """Bounds of a number, or of the number of items of a tuple, for ``typing.Annotated``."""

    at_least: int | float | None = None
    above: int | float | None = None
    at_most: int | float | None = None
    below: int | float | None = None

    def hold(self, value: int | float) -> bool:
        """Return whether a value is within the bounds."""
        return not (
            (self.at_least is not None and value < self.at_least)
            or (self.above is not None and value <= self.above)
            or (self.at_most is not None and value > self.at_most)
            or (self.below is not None and value >= self.below)
        )

    def __str__(self) -> str:
        low = self.above if self.at_least is None else self.at_least
        high = self.below if self.at_most is None else self.at_most
        if low is None or high is None or (self.above is not None and self.at_most is not None):
            parts = dataclasses.asdict(self).items()
            return " and ".join(
                f"{name.replace('_', ' ')} {n}" for name, n in parts if n is not None
            )
        if self.above is not None:
            return f"between {low} and {high}"
        return f"from {low} to {'below ' if self.at_most is None else ''}{high}"


PositiveInt = Annotated[int, Bounds(at_least=1)]
NonNegativeInt = Annotated[int, Bounds(at_least=0)]
PositiveFloat = Annotated[float, Bounds(above=0)]
NonNegativeFloat = Annotated[float, Bounds(at_least=0)]
Fraction = Annotated[float, Bounds(at_least=0, at_most=1)]
ProperFraction = Annotated[float, Bounds(at_least=0, below=1)]


class Options:
    """The base class of configs: frozen dataclasses whose values are checked against the annotations of their fields.

    Numbers of NumPy become Python's, integers become floats where the field is a float, and lists become tuples, so
    that a config can be hashed and written as JSON.
    """

    def __post_init__(self):
        """Check the value of each field.

        Raises:
            ValueError: A value is of another type or out of bounds; the message names the field, the value and what is valid.
        """
        for name, kind in _kinds(type(self)).items():
            value = getattr(self, name)
            fitted = checked(f"{type(self).__name__}.{name}", value, kind)
            if fitted is not value:
                object.__setattr__(self, name, fitted)


def checked(name: str, value: Any, kind: Any) -> Any:
    """Return a value as an annotation has it, such as an argument of a function.

    Args:
        name: The name of the argument, for the message.
        value: The value.
        kind: The annotation.

    Raises:
        ValueError: The value is of another type or out of bounds; the message names it and what is valid.

    Example:
        >>> checked("epochs", 0, PositiveInt)
        Traceback (most recent call last):
            ...
        ValueError: epochs must be at least 1, got 0
    """
    try:
        return _fitted(value, kind)
    except _Unfit as unfit:
        raise ValueError(
            f"{name}{unfit.item} must be {unfit.wanted}, got {unfit.value!r}{unfit.advice}"
        ) from None


def check(config: Any, holds: bool, field: str, wanted: str) -> None:
    """Raise a ValueError that names ``field`` and its value unless ``holds``: for what depends on several fields.

    Args:
        config: The dataclass with the field.
        holds: Whether the value is valid.
        field: The name of the field.
        wanted: What the value must be, optionally followed by ``"; "`` and advice, which is placed after the value.
    """
    if not holds:
        wanted, _, advice = wanted.partition("; ")
        raise ValueError(
            f"{type(config).__name__}.{field} must be {wanted}, got {getattr(config, field)!r}"
            + (f"; {advice}" if advice else "")
        )


def is_finite(value: Any) -> bool:
    """Return whether a value is a finite real number, of Python or NumPy, that fits in a float; a bool is not.

    Example:
        >>> is_finite(3), is_finite(float("inf")), is_finite("3"), is_finite(None)
        (True, False, False, False)
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer of Python or NumPy; True and False are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return a hint with the names closest to ``name``, or with all names if none is close.

    Example:
        >>> did_you_mean("gtp2", ["gpt2", "bert-base"])
        "did you mean 'gpt2'?"
    """
    names = list(names)
    return _near(name, names) or f"choose one of {', '.join(map(repr, names))}"


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else ""


class _Unfit(Exception):
    """A value that its annotation does not allow; ``near`` if only its bounds do not."""

    def __init__(self, value: Any, wanted: str, *, advice: str = "", near: bool = False):
        self.value, self.wanted, self.advice, self.near, self.item = value, wanted, advice, near, ""


@functools.cache
def _kinds(config: type) -> dict[str, Any]:
    try:
        hints = typing.get_type_hints(config, include_extras=True)
    except NameError:  # a user's own config may name types that exist only for a type checker
        return {}
    return {field.name: hints[field.name] for field in dataclasses.fields(config) if field.init}


def _fitted(value: Any, kind: Any, bounds: Bounds | None = None) -> Any:
    """Return the value as the annotation ``kind`` has it, or raise ``_Unfit``."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _fitted(value, inner[0], next((b for b in inner[1:] if isinstance(b, Bounds)), None))
    if origin in (typing.Union, types.UnionType):
        return _fitted_to_one(value, inner)
    if origin is Literal:
        if any(value == one for one in inner if type(one) is type(value)):
            return value
        near = _near(value, map(str, inner)) if isinstance(value, str) else ""
        wanted = f"one of {', '.join(map(repr, inner))}"
        raise _Unfit(value, wanted, advice=near and f"; {near}", near=isinstance(value, str))
    if origin is tuple:
        return _fitted_tuple(value, inner, bounds)
    if kind in (int, float):
        if not (is_integer if kind is int else is_finite)(value):
            raise _Unfit(value, "an integer" if kind is int else "a finite number")
        number = value if type(value) is kind else kind(value)
        if bounds is not None and not bounds.hold(number):
            raise _Unfit(value, str(bounds), near=True)
        bounded = bounds is not None and (bounds.at_most, bounds.below) != (None, None)
        if kind is int and not bounded and number >= 2**63:
            raise _Unfit(value, "below 2**63", near=True)
        return number
    if kind is Any or isinstance(kind, typing.TypeVar):
        return value
    if kind in (None, type(None)):
        if value is not None:
            raise _Unfit(value, "None")
        return value
    cls = origin or kind
    if not isinstance(value, cls):
        raise _Unfit(value, _NAMES.get(cls) or f"of type {cls.__name__}")
    if cls is str and value != value.encode(errors="replace").decode():
        raise _Unfit(value, "valid UTF-8", near=True)
    return value


_NAMES = {bool: "True or False", str: "a text", collections.abc.Callable: "a function"}


def _fitted_to_one(value: Any, kinds: tuple[Any, ...]) -> Any:
    """Return the value as the first of several annotations that allows it."""
    unfits = []
    for kind in kinds:
        try:
            return _fitted(value, kind)
        except _Unfit as unfit:
            unfits.append(unfit)
    # If the value is of one of the types, what the other types allow is no help, except None.
    told = [unfit for unfit in unfits if unfit.near or unfit.item]
    told = [*told, *(unfit for unfit in unfits if unfit.wanted == "None")] if told else unfits
    if told[0].item:
        raise told[0]
    wanted = ", or ".join(unfit.wanted for unfit in told)
    raise _Unfit(value, wanted, advice=told[0].advice, near=told[0].near)


def _fitted_tuple(value: Any, kinds: tuple[Any, ...], bounds: Bounds | None) -> tuple[Any, ...]:
    """Return a tuple or list as a tuple of the annotated items."""
    if not isinstance(value, tuple | list):
        raise _Unfit(value, "a tuple")
    if kinds[-1:] == (...,):
        kinds = kinds[:1] * len(value)
    elif len(value) != len(kinds):
        raise _Unfit(value, f"a tuple of {len(kinds)} items")
    if bounds is not None and not bounds.hold(len(value)):
        raise _Unfit(value, f"a tuple whose length is {bounds}", near=True)
    items = []
    for place, (item, kind) in enumerate(zip(value, kinds, strict=True)):
        try:
            items.append(_fitted(item, kind))
        except _Unfit as unfit:
            unfit.item = f"[{place}]{unfit.item}"
            raise
    same = isinstance(value, tuple) and all(a is b for a, b in zip(items, value, strict=True))
    return value if same else tuple(items)
