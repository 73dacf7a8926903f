"""Questions, answers and preferences without a download: what functions of Python's standard library do."""

import ast
import functools
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from effscale.data import Splits, StandardLibrary
from effscale.data.seeds import check_seed
from effscale.rlhf.data.record import Message, Record

# Copies and tools that nobody calls: their functions would repeat others or say little.
_LEFT_OUT = frozenset(("encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "turtledemo"))
SHORTEST, LONGEST = 20, 200
"""How many characters an answer has at least and at most."""

# Not after the full stop of an abbreviation.
_SENTENCE = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!\beg)(?<!\bie)(?<!etc)(?<!vs)(?<!cf)[.!?](?=\s|$)")
_CALL = re.compile(r"[\w.]+\(")


class Function(NamedTuple):
    """A function and what its documentation says first.

    Attributes:
        name: With its module and class, such as ``json.JSONDecoder.decode``.
        signature: Its arguments, without the object that it is a method of.
        summary: The first sentence.
    """

    name: str
    signature: str
    summary: str


class LibraryPairs(NamedTuple):
    """What :func:`standard_library_pairs` returns.

    Attributes:
        train: Records to learn from.
        held_out: Records of other functions, none of which occurs among the former, not even as a rejected response.
    """

    train: tuple[Record, ...]
    held_out: tuple[Record, ...]


def standard_library_pairs(
    seed: int = 0, *, held_out: float = 0.1, rejected: int = 1
) -> LibraryPairs:
    """Pairs made of the running Python's standard library: some thousands, the same ones every time.

    The prompt asks what a function does and gives its signature, the chosen response is the first sentence of its documentation, and the
    rejected one is that of another function. Each sentence is rejected as often as it is chosen, so that nothing can be learned from the
    sentence alone. The source is parsed and never imported or run. Another version of Python has other functions.

    Args:
        seed: Decides which functions are held out, what is rejected, and the order.
        held_out: The share of functions to hold out.
        rejected: How many records a function to learn from has, each with another rejected response. A reward model that reads each record once
            then learns from more comparisons; held-out functions have one record.

    Raises:
        ValueError: An argument is out of range.
        FileNotFoundError: This Python has no source files of its library.

    Example:
        >>> pairs = standard_library_pairs()
        >>> len(pairs.train) > 1000 and len(pairs.held_out) > 100
        True
    """
    check_seed(seed)
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out}: must be above 0 and below 1")
    if rejected < 1:
        raise ValueError(f"rejected={rejected}: must be at least 1")
    splits = Splits(fractions={"train": 1 - held_out, "held_out": held_out}, seed=seed)
    parts: dict[str, list[Function]] = {name: [] for name in splits.fractions}
    for function in library_functions():
        parts[splits.assign(function.summary)].append(function)
    for name, functions in parts.items():
        if len(functions) < 2:
            raise ValueError(
                f"held_out={held_out}: {name} would have {len(functions)} functions, and pairs need two"
            )
    train, held = (
        _pairs(functions, np.random.default_rng(np.random.SeedSequence([seed, number])), times)
        for number, (functions, times) in enumerate(
            ((parts["train"], rejected), (parts["held_out"], 1))
        )
    )
    return LibraryPairs(train, held)


def library_functions() -> tuple[Function, ...]:
    """The documented public functions and methods of the standard library, by module; of those with the same first sentence the first.

    The second call in a process parses nothing again.
    """
    return _parsed(StandardLibrary().fingerprint()["files"])


@functools.lru_cache(maxsize=2)
def _parsed(digest: str) -> tuple[Function, ...]:
    del digest
    found: dict[str, Function] = {}
    names: set[str] = set()
    for document in StandardLibrary().documents(log=False):
        if not document.source.startswith("stdlib/"):
            break  # topics of help(), which come after all modules
        parts = document.source.removeprefix("stdlib/").removesuffix(".py").split("/")
        if parts[-1] == "__init__":
            parts.pop()
        if not parts or parts[0] in _LEFT_OUT or any(part.startswith("_") for part in parts):
            continue
        try:
            tree = ast.parse(document.text)
        except (SyntaxError, ValueError):
            continue
        for name, function in _functions(tree, ".".join(parts)):
            summary = first_sentence(ast.get_docstring(function) or "")
            if name not in names and SHORTEST <= len(summary) <= LONGEST:
                names.add(name)
                found.setdefault(summary, Function(name, _signature(function), summary))
    return tuple(found.values())


def first_sentence(docstring: str) -> str:
    r"""The first sentence of a documentation, on one line; nothing where it begins with a call, as old documentations do.

    Example:
        >>> first_sentence("Return the sum, e.g. of\n    two numbers.  May raise.")
        'Return the sum, e.g. of two numbers.'
    """
    text = " ".join(docstring.strip().split("\n\n")[0].split())
    if _CALL.match(text):
        return ""
    end = _SENTENCE.search(text)
    return text[: end.end()] if end else text


_FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def _functions(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, _FunctionNode]]:
    for child in node.body:
        if isinstance(child, ast.ClassDef | _FunctionNode) and not child.name.startswith("_"):
            name = f"{prefix}.{child.name}"
            if isinstance(child, ast.ClassDef):
                yield from _functions(child, name)
            elif all(map(_is_plain, child.decorator_list)):
                yield name, child


def _is_plain(decorator: ast.expr) -> bool:
    """Whether a decorated function is still called as it is written; a property, say, is not."""
    return isinstance(decorator, ast.Name) and decorator.id in ("classmethod", "staticmethod")


def _signature(function: _FunctionNode) -> str:
    arguments = function.args
    for listed in (arguments.posonlyargs, arguments.args):
        if listed and listed[0].arg in ("self", "cls"):
            del listed[0]
            break
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return f"({ast.unparse(arguments)}){returns}"


def _pairs(
    functions: list[Function], generator: np.random.Generator, times: int
) -> tuple[Record, ...]:
    records = []
    for _ in range(times):
        # Around a circle in random order each function's answer is refused for the one before it.
        order = generator.permutation(len(functions))
        for here, there in zip(order, np.roll(order, -1), strict=True):
            function = functions[here]
            question = f"What does the Python function `{function.name}{function.signature}` do?"
            records.append(
                Record(
                    prompt=(Message("user", question),),
                    chosen=function.summary,
                    rejected=functions[there].summary,
                )
            )
    return tuple(records)
