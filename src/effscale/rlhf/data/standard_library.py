"""Questions, answers and preferences without a download, from the documentation of Python's standard library."""

import ast
import functools
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from effscale.data import Splits, StandardLibrary
from effscale.data.seeds import check_seed
from effscale.rlhf.data.record import Message, Record

# Copies and internal tools: their functions would repeat others or say little.
_LEFT_OUT = frozenset(("encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "turtledemo"))
SHORTEST, LONGEST = 20, 200
"""Minimum and maximum number of characters of an answer."""

# Not after the period of an abbreviation.
_SENTENCE = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!\beg)(?<!\bie)(?<!etc)(?<!vs)(?<!cf)[.!?](?=\s|$)")
_CALL = re.compile(r"[\w.]+\(")


class Documented(NamedTuple):
    """A function, method or class and the first sentence of its documentation.

    Attributes:
        kind: ``function`` or ``class``.
        name: With its module and class, such as ``json.JSONDecoder.decode``.
        signature: Its arguments without ``self``. For a class, those of its own ``__init__``, or ``()`` if it has
            none.
        summary: The first sentence.
    """

    kind: Literal["function", "class"]
    name: str
    signature: str
    summary: str


class LibraryPairs(NamedTuple):
    """The result of ``standard_library_pairs``.

    Attributes:
        train: Records to learn from.
        held_out: Records of other functions and classes, none of which occurs in ``train``, not even as a rejected
            response.
    """

    train: tuple[Record, ...]
    held_out: tuple[Record, ...]


def standard_library_pairs(
    seed: int = 0, *, held_out: float = 0.1, rejected: int = 1
) -> LibraryPairs:
    """Create a few thousand pairs from the standard library of the running Python, the same ones every time.

    The prompt asks what a function or class does and gives its signature. The chosen response is the first sentence
    of its documentation, and the rejected response is that of another one. Each sentence is rejected as often as it
    is chosen, so that nothing can be learned from the sentence by itself.

    Functions and classes whose names begin with an underscore are included; special methods and properties are not.
    The source is parsed, never imported or run. The pairs depend on the version of Python.

    Args:
        seed: Seed of the split, the rejected responses, and the order.
        held_out: The share of functions and classes to hold out.
        rejected: Number of training records per function or class, each with a different rejected response. A reward
            model that reads each record once then learns from more comparisons. Held-out functions and classes have
            one record each.

    Raises:
        ValueError: An argument is out of range.
        FileNotFoundError: The source files of the standard library are not installed.

    Example:
        >>> pairs = standard_library_pairs()
        >>> len(pairs.train) > 1000 and len(pairs.held_out) > 100
        True
    """
    check_seed(seed)
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be above 0 and below 1, got {held_out}")
    if rejected < 1:
        raise ValueError(f"rejected must be at least 1, got {rejected}")
    splits = Splits(fractions={"train": 1 - held_out, "held_out": held_out}, seed=seed)
    parts: dict[str, list[Documented]] = {name: [] for name in splits.fractions}
    for found in documented():
        parts[splits.assign(found.summary)].append(found)
    for name, part in parts.items():
        if len(part) < 2:
            raise ValueError(
                f"held_out must leave at least two functions and classes in each part, got {held_out}, which leaves {len(part)} in {name}"
            )
    train, held = (
        _pairs(part, np.random.default_rng(np.random.SeedSequence([seed, number])), times)
        for number, (part, times) in enumerate(((parts["train"], rejected), (parts["held_out"], 1)))
    )
    return LibraryPairs(train, held)


def documented() -> tuple[Documented, ...]:
    """Return the documented functions, methods and classes of the standard library, by module; only the first with
    the same first sentence.

    The result is cached within the process.
    """
    return _parsed(StandardLibrary().fingerprint()["files"])


@functools.lru_cache(maxsize=2)
def _parsed(digest: str) -> tuple[Documented, ...]:
    del digest
    found: dict[str, Documented] = {}
    names: set[str] = set()
    for document in StandardLibrary().documents(log=False):
        if not document.source.startswith("stdlib/"):
            break  # topics of help(), which come after all modules
        parts = document.source.removeprefix("stdlib/").removesuffix(".py").split("/")
        if parts[-1] == "__init__":
            parts.pop()
        if not parts or parts[0] in _LEFT_OUT or parts[-1] == "__main__":
            continue
        try:
            tree = ast.parse(document.text)
        except (SyntaxError, ValueError):
            continue
        for name, node in _definitions(tree, ".".join(parts)):
            summary = first_sentence(ast.get_docstring(node) or "")
            if name not in names and SHORTEST <= len(summary) <= LONGEST:
                names.add(name)
                kind = "class" if isinstance(node, ast.ClassDef) else "function"
                found.setdefault(summary, Documented(kind, name, _signature(node), summary))
    return tuple(found.values())


def first_sentence(docstring: str) -> str:
    r"""Return the first sentence of a docstring on one line, or nothing if it begins with a call, as old docstrings do.

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


def _definitions(
    node: ast.Module | ast.ClassDef, prefix: str
) -> Iterator[tuple[str, _FunctionNode | ast.ClassDef]]:
    for child in node.body:
        if isinstance(child, ast.ClassDef | _FunctionNode) and not child.name.startswith("__"):
            name = f"{prefix}.{child.name}"
            if isinstance(child, ast.ClassDef):
                yield name, child
                yield from _definitions(child, name)
            elif all(map(_is_plain, child.decorator_list)):
                yield name, child


def _is_plain(decorator: ast.expr) -> bool:
    """Return whether a decorated function is still called as written; a property, for example, is not."""
    return isinstance(decorator, ast.Name) and decorator.id in ("classmethod", "staticmethod")


def _signature(node: _FunctionNode | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        return _signature(inits[0]) if inits else "()"
    arguments = node.args
    for listed in (arguments.posonlyargs, arguments.args):
        if listed and listed[0].arg in ("self", "cls"):
            del listed[0]
            break
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(arguments)}){returns}"


def _pairs(
    found: list[Documented], generator: np.random.Generator, times: int
) -> tuple[Record, ...]:
    records = []
    for _ in range(times):
        # In a random circular order, each answer is rejected for the previous question.
        order = generator.permutation(len(found))
        for here, there in zip(order, np.roll(order, -1), strict=True):
            kind, name, signature, summary = found[here]
            question = f"What does the Python {kind} `{name}{signature}` do?"
            records.append(
                Record(
                    prompt=(Message("user", question),),
                    chosen=summary,
                    rejected=found[there].summary,
                )
            )
    return tuple(records)
