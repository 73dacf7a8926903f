"""Selection of parameters by a regular expression that is searched in their names."""

import difflib
import re
from collections.abc import Callable, Sequence

BY_NAME = "by_name"
"""Metadata of a parameter: a word, such as ``router``. Expressions without this word do not select it for quantization or pruning."""

# Constructs in which a bar does not separate alternatives: an escape, a character class, a group.
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|[()|]", re.DOTALL)


def name_search(pattern: str, names: Sequence[str], *, option: str) -> Callable[[str], bool]:
    """Return a predicate that tests whether ``pattern`` is found in a name.

    An alternative that matches no name would silently select nothing, so it is an error.

    Args:
        pattern: A regular expression for ``re.search``.
        names: All names to select from.
        option: The user's name for the pattern, used in error messages.

    Raises:
        ValueError: The pattern is not a regular expression, or one of its alternatives matches no name.

    Example:
        >>> chosen = name_search("query|head", ["query.kernel", "query.bias", "head.bias"], option="where")
        >>> chosen("query.kernel")
        True
    """
    try:
        whole = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{option} must be a regular expression, got {pattern!r}: {error}"
        ) from None
    for part in alternatives(pattern):
        try:
            search = re.compile(part, whole.flags).search
        except re.error:  # it refers to a group in another alternative
            continue
        if not any(map(search, names)):
            which = "" if part == pattern else f": the alternative {part!r}"
            raise ValueError(
                f"{option}={pattern!r}{which} matches no parameter; {_hint(part, names)}"
            )
    return lambda name: whole.search(name) is not None


def alternatives(pattern: str) -> list[str]:
    """Split a regular expression at its outermost bars.

    Example:
        >>> alternatives("query|(key|value)[|]kernel")
        ['query', '(key|value)[|]kernel']
    """
    parts, depth, start = [], 0, 0
    for token in _TOKEN.finditer(pattern):
        depth += {"(": 1, ")": -1}.get(token[0], 0)
        if token[0] == "|" and depth == 0:
            parts.append(pattern[start : token.start()])
            start = token.end()
    return [*parts, pattern[start:]]


def _hint(pattern: str, names: Sequence[str]) -> str:
    """Return names similar to the words of a pattern or, if there are none, one example of each kind of name."""
    known = sorted({part for name in names for part in name.split(".")})
    words = set(re.findall(r"\w{2,}", re.sub(r"\\.", " ", pattern))) - set(known)
    near = {name for word in words for name in difflib.get_close_matches(word, known)}
    if near:
        return f"did you mean {' or '.join(map(repr, sorted(near)))}?"
    examples = {re.sub(r"\d+", "", name): name for name in reversed(names)}.values()
    return f"names are like: {', '.join(sorted(examples)[:16]) or '(the model has none)'}"
