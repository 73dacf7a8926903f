"""What a corpus is made of, for those who read about a model that was trained on it."""

import json
import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from effscale.atomic import atomic_file
from effscale.data.corpus import Corpus
from effscale.models.validation import check, is_finite


@dataclass(frozen=True, kw_only=True)
class DatasheetEntry:
    """A component of a mixture.

    Attributes:
        name: Of the component.
        language: Its language, or the programming language of its code.
        licence: Under which its text may be used.
        corpus: What `prepare_corpus` made of it.
        weight: Its share of the training rows; 1 for all of them.

    Raises:
        ValueError: A name is empty, or the weight is out of range.
    """

    name: str
    language: str
    licence: str
    corpus: Corpus
    weight: float = 1.0

    def __post_init__(self):
        for name in ("name", "language", "licence"):
            check(self, bool(getattr(self, name).strip()), name, "a text; say 'unknown' if it is")
        check(
            self, is_finite(self.weight) and 0 < self.weight <= 1, "weight", "above 0 and at most 1"
        )


def write_datasheet(
    folder: str | os.PathLike[str], entries: Sequence[DatasheetEntry]
) -> pathlib.Path:
    """Writes ``datasheet.md`` and ``datasheet.json``: documents, bytes, tokens, language, licence and weight of each component, and what was left out of it.

    Args:
        folder: Where to, such as the run folder or the one of the token stores.
        entries: The components.

    Returns:
        The Markdown file.

    Raises:
        ValueError: There is no component.

    References:
        Gebru et al., "Datasheets for datasets", 2018. The corpus of BLOOM has such a table: Laurençon et al., "The BigScience ROOTS Corpus", 2022.
    """
    if not entries:
        raise ValueError("entries=[]: a datasheet needs at least one component")
    rows: list[dict[str, Any]] = [
        {
            "name": entry.name,
            "language": entry.language,
            "licence": entry.licence,
            "weight": entry.weight,
            "documents": sum(store.num_documents for store in _stores(entry)),
            "bytes": entry.corpus.num_bytes,
            "tokens": sum(store.num_tokens for store in _stores(entry)),
            "sources": entry.corpus.train.manifest["metadata"]["sources"],
            "left_out": entry.corpus.skipped["counts"],
        }
        for entry in entries
    ]
    place = pathlib.Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    with atomic_file(place / "datasheet.json") as file:
        file.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = [
        "# Datasheet",
        "",
        "Documents, bytes (UTF-8) and tokens are those that were kept, training and held-out text together. The weight is a component's share of the training rows.",
        "",
        "| name | language | licence | weight | documents | bytes | tokens | left out |",
        "|---|---|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        left = ", ".join(f"{n:,} {reason}" for reason, n in row["left_out"].items()) or "none"
        words = [row["name"], row["language"], row["licence"], f"{row['weight']:.3f}"]
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
