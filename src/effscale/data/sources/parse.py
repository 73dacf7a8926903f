"""Sources and mixtures from their string form on the command line."""

import difflib
import os
import re
from collections.abc import Sequence
from typing import Any

from effscale.data.documents import OnError, Source
from effscale.data.sources.hugging_face import HuggingFace
from effscale.data.sources.json_lines import JsonLines
from effscale.data.sources.parquet import Parquet
from effscale.data.sources.standard_library import StandardLibrary
from effscale.data.sources.text_files import TextFiles

_FORMS = "stdlib, text:GLOB, jsonl:GLOB#field, parquet:GLOB#field, hf:NAME[:CONFIG]#field"
_WEIGHTED = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\*(.+)", re.DOTALL)


def parse_source(spec: str, *, on_error: OnError | None = None) -> Source:
    """Create a source from its string form.

    Args:
        spec: ``stdlib``, ``text:GLOB``, ``jsonl:GLOB#field``, ``parquet:GLOB#field`` or
            ``hf:NAME[:CONFIG]#field``. Separate several globs by commas. The default field is ``text``.
        on_error: What to do with unusable documents; None keeps the default of the source.

    Raises:
        ValueError: The kind is unknown, or the string lacks a file or dataset.

    >>> parse_source("jsonl:shards/*.jsonl#content")
    JsonLines(on_error='raise', paths=('shards/*.jsonl',), field='content')
    """
    options: dict[str, Any] = {} if on_error is None else {"on_error": on_error}
    kind, colon, rest = spec.partition(":")
    if kind == "stdlib" and not colon:
        return StandardLibrary(**options)
    known = ["stdlib", "text", "jsonl", "parquet", "hf"]
    if kind not in known[1:]:
        near = difflib.get_close_matches(kind, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"corpus must have one of the forms {_FORMS}, got {spec!r}.{hint}")
    if not rest or rest.startswith("#"):
        raise ValueError(
            f"corpus must name a {'dataset' if kind == 'hf' else 'file'}, got {spec!r}"
        )
    if kind == "text":
        return TextFiles(paths=_globs(rest), **options)
    name, hash_sign, field = rest.rpartition("#")
    if not hash_sign:
        name, field = rest, "text"
    if kind == "jsonl":
        return JsonLines(paths=_globs(name), field=field, **options)
    if kind == "parquet":
        return Parquet(paths=_globs(name), field=field, **options)
    config = None
    if not os.path.exists(name):
        name, _, config = name.partition(":")
    return HuggingFace(name=name, config=config or None, field=field, **options)


def parse_mixture(
    specs: str | Sequence[str], *, on_error: OnError | None = None
) -> tuple[tuple[Source, ...], tuple[float, ...]]:
    """Create the sources and weights of a mixture from strings of the form ``[WEIGHT*]SPEC``.

    Args:
        specs: The components; the default weight is 1.
        on_error: As in `parse_source`.

    Returns:
        The sources and their weights, normalized to sum to 1.

    Raises:
        ValueError: ``specs`` is empty, or a weight is zero.

    >>> sources, weights = parse_mixture(["3*stdlib", "1*text:books/*.txt"])
    >>> weights
    (0.75, 0.25)
    """
    if isinstance(specs, str):
        specs = [specs]
    if not specs:
        raise ValueError("a mixture needs at least one corpus")
    sources, weights = [], []
    for spec in specs:
        match = _WEIGHTED.fullmatch(spec)
        weight = float(match[1]) if match else 1.0
        if weight <= 0:
            raise ValueError(
                f"the weight of a corpus must be above 0, got {spec!r}. Leave the corpus out instead."
            )
        sources.append(parse_source(match[2] if match else spec, on_error=on_error))
        weights.append(weight)
    total = sum(weights)
    return tuple(sources), tuple(weight / total for weight in weights)


def _globs(text: str) -> list[str]:
    # A file name can contain a comma.
    return [text] if os.path.exists(text) else [part for part in text.split(",") if part]
