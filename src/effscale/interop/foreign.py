"""Values from files of other programs, checked when they are read; errors name the file, the field and the value."""

import contextlib
import dataclasses
import reprlib
import sys
from collections.abc import Callable, Generator, Mapping
from typing import Any

from effscale.interop.tensors import FolderError

UNFORESEEN = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError)
"""The exceptions, in addition to ValueError, that Python raises for a value of an unexpected kind."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80

LIMIT = 2**31
"""Upper bound of whole numbers: no size of a model is near it, and shapes of such sizes can still be computed with."""


@contextlib.contextmanager
def reading(what: str, *also: type[Exception]) -> Generator[None]:
    """Guard a reader: convert any exception that an unexpected value causes into one error.

    Readers check what they can foresee and name the field; this covers the rest.

    Args:
        what: What is read, as the beginning of a sentence.
        also: Additional exceptions, if a library raises its own.

    Raises:
        FolderError: In place of any exception that a value of an unexpected kind can cause.

    Example:
        >>> with reading("'model/config.json' cannot be read"):
        ...     {}["hidden_size"]
        Traceback (most recent call last):
        ...
        effscale.interop.tensors.FolderError: 'model/config.json' cannot be read: KeyError: 'hidden_size'
    """
    try:
        yield
    except FolderError:
        raise
    except ValueError as error:
        raise FolderError(f"{what}: {error}") from error
    except (*UNFORESEEN, *also) as error:
        raise FolderError(f"{what}: {type(error).__name__}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Fields:
    """The fields of a JSON object, or of another file's header, by name and type.

    A field that is absent or null has its default. Without a default, this is an error, as is a value of another type.

    Attributes:
        where: The file, for errors.
        values: The fields.

    Example:
        >>> fields = Fields("config.json", {"n_embd": 8.0, "n_head": "two"})
        >>> fields.whole("n_embd")
        8
        >>> fields.whole("n_head")
        Traceback (most recent call last):
        ...
        effscale.interop.tensors.FolderError: config.json: n_head must be a whole number from 0 to 2147483647, got 'two'
    """

    where: str
    values: Mapping[str, Any]

    def whole(self, name: str, default: Any = ..., *, least: int = 0) -> Any:
        """Return a whole number; JSON does not distinguish integers from other numbers, so 8.0 is one."""
        fits = lambda v: _is_number(v) and least <= v < LIMIT and v == int(v)
        return self._read(name, default, fits, int, f"a whole number from {least} to {LIMIT - 1}")

    def number(self, name: str, default: Any = ...) -> Any:
        """Return a finite number, as a float."""
        return self._read(name, default, _is_number, float, "a finite number")

    def flag(self, name: str, default: Any = ...) -> Any:
        """Return true or false."""
        return self._read(name, default, lambda v: isinstance(v, bool), bool, "true or false")

    def text(self, name: str, default: Any = ...) -> Any:
        """Return a string."""
        return self._read(name, default, lambda v: isinstance(v, str), str, "a string")

    def strings(self, name: str, default: Any = ...) -> Any:
        """Return a list of strings."""
        fits = lambda v: isinstance(v, list) and all(isinstance(part, str) for part in v)
        return self._read(name, default, fits, list, "a list of strings")

    def wholes(self, name: str, default: Any = ...) -> Any:
        """Return a list of whole numbers."""
        fits = lambda v: (
            isinstance(v, list)
            and all(_is_number(part) and 0 <= part < LIMIT and part == int(part) for part in v)
        )
        return self._read(name, default, fits, lambda v: [*map(int, v)], "a list of whole numbers")

    def block(self, name: str, default: Any = ...) -> Any:
        """Return an object with fields of its own."""
        inner = lambda values: Fields(f"{self.where.rstrip(',')}, in {name},", values)
        return self._read(name, default, lambda v: isinstance(v, dict), inner, "an object")

    def _read(
        self,
        name: str,
        default: Any,
        fits: Callable[[Any], bool],
        convert: Callable[[Any], Any],
        wanted: str,
    ) -> Any:
        value = self.values.get(name)
        if value is None and default is not ...:
            return default
        if name not in self.values:
            raise FolderError(f"{self.where.rstrip(',')}: {name} is missing; it must be {wanted}")
        if value is None or not fits(value):
            given = "null" if value is None else shown(value)
            raise FolderError(f"{self.where.rstrip(',')}: {name} must be {wanted}, got {given}")
        return convert(value)


def shown(value: Any) -> str:
    """Return a shortened value for an error: a file of another program can contain one of any length."""
    return _SHORT.repr(value)


def _is_number(value: Any) -> bool:
    # A comparison never overflows, unlike the conversion of a long integer; with NaN it is false.
    largest = sys.float_info.max
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= largest
