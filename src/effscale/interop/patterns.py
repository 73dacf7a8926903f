r"""Regular expressions in files of other programs, which match names of modules.

``re`` backtracks: on ``(a+)+b``, it does not finish for a name of forty letters. So a pattern is compiled only if it has
the syntax that names of modules need (letters, ``.``, classes, ``\d`` and similar, repetitions of these, alternatives,
groups that may be optional, ``^`` and ``$``) and leaves few ways to match: a malicious file cannot cause a long wait.
"""

import functools
import re
from collections.abc import Callable

MAX_LENGTH = 1000
"""Maximum number of characters in a pattern."""

MAX_NAME = 300
"""Maximum number of characters in a name that can match; the longest real names have about a hundred."""

MAX_WAYS = 2_000_000
"""Maximum product of the numbers of ways in which the parts of a pattern can match."""

OPEN_WAYS = 40
"""Ways of a repetition without an end, such as ``.*``: up to three of them may occur where each can end anywhere."""

LETTER = r"(?:\\[dDwWsS]|\\[^\w\s]|[^\\\[\]])"
TOKEN = re.compile(
    rf"""(?P<group> \( (?:\?:)?) | (?P<end> \)\??) | (?P<either> \|) | (?P<place> [\^$])
    | (?P<letter> \[\^?{LETTER}+\] | (?![*+?()|{{}}]){LETTER}) (?P<times> [*+?]\?? | \{{\d{{1,4}}(?:,\d{{0,4}})?\}}\?? )?""",
    re.VERBOSE,
)


@functools.lru_cache(maxsize=1024)
def matcher(pattern: str) -> Callable[[str], bool]:
    r"""Compile a pattern that must match a module's path, or a part of it after a dot, to the end: PEFT's rule.

    Raises:
        ValueError: The pattern is not a supported regular expression.

    Example:
        >>> matches = matcher(r"layers\.\d+\.(mlp|attention)\..*proj")
        >>> matches("model.layers.10.mlp.up_proj"), matches("model.xlayers.1.mlp.up_proj")
        (True, False)
    """
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"it has more than {MAX_LENGTH} characters")
    if _ways(pattern) > MAX_WAYS:
        raise ValueError("it can match in too many ways")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(str(error)) from error

    def matches(path: str) -> bool:
        starts = (0, *(i + 1 for i, letter in enumerate(path) if letter == "."))
        return len(path) <= MAX_NAME and any(compiled.fullmatch(path, i) for i in starts)

    return matches


def _ways(pattern: str) -> int:
    """Return a bound of the number of ways in which a pattern can match.

    Raises:
        ValueError: Its syntax is not supported.
    """
    ways, place = 1, 0
    either = [1]  # alternatives of the groups that are open
    while place < len(pattern):
        token = TOKEN.match(pattern, place)
        if token is None:
            raise ValueError(f"{pattern[place : place + 8]!r} is not supported")
        place = token.end()
        match token.lastgroup:
            case "group":
                either.append(1)
            case "either":
                either[-1] += 1
            case "end" if len(either) == 1:
                raise ValueError("a ')' has no matching '('")
            case "end":
                ways *= either.pop() + (token[0] == ")?")
            case "letter" | "times":
                if re.search(r"--|\|\||&&|~~", token["letter"]):
                    raise ValueError(f"{token['letter']!r} is ambiguous")
                if token["times"]:
                    ways *= _ways_of(token["letter"], token["times"], pattern[place : place + 2])
    return ways * either[0]


def _ways_of(letter: str, times: str, then: str) -> int:
    """Return the number of ends of a repetition: one, if what follows it cannot be one more of the same."""
    low, comma, high = times.rstrip("?").strip("{}").partition(",")
    if times[0] == "{":
        return max(int(high) - int(low), 0) + 1 if high else OPEN_WAYS if comma else 1
    if times[0] == "?":
        return 2
    only = then.removeprefix("\\") if then[:1] == "\\" else then[:1]
    apart = letter in (r"\d", r"\w") and only in (".", "-") and then[:1] == "\\"
    return 1 if apart else OPEN_WAYS
