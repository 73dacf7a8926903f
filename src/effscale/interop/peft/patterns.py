r"""Regular expressions of ``adapter_config.json``, matched in linear time.

PEFT runs them with ``re``, which backtracks: on ``(a+)+b``, it does not finish for a name of forty letters. Here all
alternatives are followed at the same time, as the set of reached positions in the name, so a malicious file cannot cause
a long wait. The supported syntax is what names of modules need: letters, ``.``, classes, ``\d`` and similar, repetitions
of these, alternatives, groups that may be optional, ``^`` and ``$``. Everything else (a repeated group, lookaround,
backreferences) is rejected.

References:
    Thompson, "Regular Expression Search Algorithm" (1968). https://doi.org/10.1145/363347.363387
"""

import re
from collections.abc import Callable

MAX_LENGTH = 1000
"""Maximum number of characters in a pattern; the longest names of modules have about a hundred."""

MAX_GROUPS = 50

LETTER = r"(?:\\[dDwWsS]|\\[^\w\s]|[^\\\[\]])"
TOKEN = re.compile(
    rf"""(?P<group> \( (?:\?:)?) | (?P<end> \)) | (?P<either> \|) | (?P<place> [\^$])
    | (?P<times> (?: [*+?] | \{{\d{{1,4}}(?:,\d{{0,4}})?\}} ) \??)
    | (?P<letter> \[\^?{LETTER}+\] | (?![*+?()|{{}}]){LETTER})""",
    re.VERBOSE,
)
"""The syntax of a pattern. A ``?`` after a quantifier makes it lazy, which does not affect the results here."""

Places = frozenset[int]
Step = Callable[[str, Places], Places]
"""Maps the positions in a name that are reached before a part of a pattern to those reached after it."""


def matcher(pattern: str) -> Callable[[str], bool]:
    r"""Compile a pattern that must match a module's path, or a part of it after a dot, to the end: PEFT's rule.

    Args:
        pattern: The regular expression.

    Returns:
        A function of the path.

    Raises:
        ValueError: The pattern is not a supported regular expression.

    Example:
        >>> matches = matcher(r"layers\.\d+\.(mlp|attention)\..*proj")
        >>> matches("model.layers.10.mlp.up_proj"), matches("model.xlayers.1.mlp.up_proj")
        (True, False)
    """
    if len(pattern) > MAX_LENGTH or pattern.count("(") > MAX_GROUPS:
        raise ValueError(f"it has more than {MAX_LENGTH} characters or {MAX_GROUPS} groups")
    step = _Parser(pattern).whole()

    def matches(path: str) -> bool:
        starts = frozenset({0, *(i + 1 for i, letter in enumerate(path) if letter == ".")})
        return len(path) in step(path, starts)

    return matches


class _Parser:
    def __init__(self, pattern: str):
        self.tokens: list[tuple[str | None, str]] = []
        place = 0
        while place < len(pattern):
            token = TOKEN.match(pattern, place)
            if token is None:
                raise ValueError(f"{pattern[place : place + 8]!r} is not supported")
            self.tokens.append((token.lastgroup, token[0]))
            place = token.end()
        self.tokens.reverse()

    def whole(self) -> Step:
        step = self.either()
        if self.tokens:
            raise ValueError("a ')' has no matching '('")
        return step

    def either(self) -> Step:
        ways = [self.sequence()]
        while self.next_is("either"):
            self.tokens.pop()
            ways.append(self.sequence())
        return lambda path, places: frozenset().union(*(way(path, places) for way in ways))

    def sequence(self) -> Step:
        parts: list[Step] = []
        while self.tokens and not self.next_is("either", "end"):
            kind, token = self.tokens.pop()
            times = self.tokens.pop()[1] if self.next_is("times") else None
            if kind == "letter":
                parts.append(_letters(token, *_times(times or "{1}")))
            elif kind == "place" and times is None:
                parts.append(_begin if token == "^" else _end)
            elif kind == "group" and times is None:
                parts.append(self.group())
            else:
                raise ValueError(
                    f"{token + (times or '')!r} repeats something that cannot be repeated"
                )

        def step(path: str, places: Places) -> Places:
            for part in parts:
                places = part(path, places)
            return places

        return step

    def group(self) -> Step:
        inner = self.either()
        if not self.next_is("end"):
            raise ValueError("a '(' has no matching ')'")
        self.tokens.pop()
        if not self.next_is("times"):
            return inner
        times = self.tokens.pop()[1]
        if times not in ("?", "??"):
            raise ValueError(f"a group is repeated by {times!r}")
        return lambda path, places: places | inner(path, places)

    def next_is(self, *kinds: str) -> bool:
        return bool(self.tokens) and self.tokens[-1][0] in kinds


def _letters(token: str, least: int, most: int) -> Step:
    if re.search(r"--|\|\||&&|~~", token):
        raise ValueError(f"{token!r} is ambiguous")  # re warns that its meaning will change
    try:
        # One letter at a time, so that there is no backtracking.
        fits = re.compile(token).fullmatch
    except re.error as error:
        raise ValueError(f"{token!r}: {error}") from error

    def step(path: str, places: Places) -> Places:
        reached: set[int] = set()
        for place in places:
            stop = place
            while stop < len(path) and stop - place < most and fits(path[stop]):
                stop += 1
            reached.update(range(place + least, stop + 1))
        return frozenset(reached)

    return step


def _begin(path: str, places: Places) -> Places:
    del path
    return places & {0}


def _end(path: str, places: Places) -> Places:
    return places & {len(path)}


def _times(token: str) -> tuple[int, int]:
    every = MAX_LENGTH**2  # more letters than any name has
    if token[0] in "*+?":
        return {"*": (0, every), "+": (1, every), "?": (0, 1)}[token[0]]
    least, comma, most = token.rstrip("?")[1:-1].partition(",")
    low, high = int(least), int(most) if most else every if comma else int(least)
    if high < low:
        raise ValueError(f"{token!r} ends before it begins")
    return low, high
