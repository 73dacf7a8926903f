"""Datasheets: what a training corpus is made of."""

import json
import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from effscale.atomic import atomic_file
from effscale.data.corpus import Corpus
from effscale.options import Bounds, Options, check
from effscale.paths import local_path


@dataclass(frozen=True, kw_only=True)
class DatasheetEntry(Options):
    """One component of a mixture.

    Attributes:
        name: The name of the component.
        language: Its language, or the programming language of its code.
        license: The license of its text.
        corpus: The corpus that `prepare_corpus` returned.
        weight: Its share of the training rows; 1 if it is the only component.

    Raises:
        ValueError: A name is empty, or the weight is out of range.
    """

    name: str
    language: str
    license: str
    corpus: Corpus
    weight: Annotated[float, Bounds(above=0, at_most=1)] = 1.0

    def __post_init__(self):
        super().__post_init__()
        wanted = "a nonempty text; use 'unknown' if you do not know it"
        for name in ("name", "language", "license"):
            check(self, bool(getattr(self, name).strip()), name, wanted)


def write_datasheet(
    folder: str | os.PathLike[str], entries: Sequence[DatasheetEntry]
) -> pathlib.Path:
    """Write ``datasheet.md`` and ``datasheet.json`` for a training corpus.

    For each component they list documents, bytes, tokens, language, license and weight, and what was left out.

    Args:
        folder: The output folder, such as the run folder or the folder of the token stores.
        entries: The components.

    Returns:
        The Markdown file.

    Raises:
        ValueError: ``entries`` is empty.

    References:
        Gebru et al., "Datasheets for Datasets" (2018). https://arxiv.org/abs/1803.09010
        Laurençon et al., "The BigScience ROOTS Corpus" (2022), which has such a table for BLOOM's corpus.
            https://arxiv.org/abs/2303.03915
    """
    if not entries:
        raise ValueError("entries must have at least one component, got []")
    rows: list[dict[str, Any]] = [
        {
            "name": entry.name,
            "language": entry.language,
            "license": entry.license,
            "weight": entry.weight,
            "documents": sum(store.num_documents for store in _stores(entry)),
            "bytes": entry.corpus.num_bytes,
            "tokens": sum(store.num_tokens for store in _stores(entry)),
            "sources": entry.corpus.train.manifest["metadata"]["sources"],
            "left_out": entry.corpus.skipped["counts"],
        }
        for entry in entries
    ]
    place = local_path(folder)
    with atomic_file(place / "datasheet.json") as file:
        file.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = [
        "# Datasheet",
        "",
        "Documents, bytes (UTF-8) and tokens count what was kept, training and held-out text together. The weight is a component's share of the training rows.",
        "",
        "| name | language | license | weight | documents | bytes | tokens | left out |",
        "|---|---|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        left = ", ".join(f"{n:,} {reason}" for reason, n in row["left_out"].items()) or "none"
        words = [row["name"], row["language"], row["license"], f"{row['weight']:.3f}"]
        counts = [f"{row[key]:,}" for key in ("documents", "bytes", "tokens")]
        lines.append("| " + " | ".join([*words, *counts, left]).replace("\n", " ") + " |")
    total = lambda key: f"{sum(row[key] for row in rows):,}"
    counts = [total(key) for key in ("documents", "bytes", "tokens")]
    weight = f"{sum(row['weight'] for row in rows):.3f}"
    lines.append("| " + " | ".join(["all", "", "", weight, *counts, ""]) + " |")
    with atomic_file(place / "datasheet.md") as file:
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return place / "datasheet.md"


def _stores(entry: DatasheetEntry):
    return entry.corpus.train, entry.corpus.validation
