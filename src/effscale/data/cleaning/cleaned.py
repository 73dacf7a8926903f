"""A source that filters the documents of another source."""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

from effscale.data.cleaning.duplicates import NearDuplicateIndex, NearDuplicates, digest
from effscale.data.cleaning.quality import Quality
from effscale.data.documents import Document, Reason, SkipReport, Source

BATCH = 64
"""The number of documents examined together."""


class Examined(NamedTuple):
    """The result of the checks that look at one document at a time.

    Attributes:
        fault: The quality fault, if any.
        digest: Equal for documents with the same text.
        signature: The MinHash signature, to find similar documents.
    """

    fault: tuple[Reason, str] | None
    digest: bytes
    signature: np.ndarray | None


Examine = Callable[[Sequence[str]], list[Examined]]
Runner = Callable[[Examine, Iterable[Sequence[str]]], Iterator[list[Examined]]]
"""Examines batches of texts and yields the results in the same order."""


def local_runner(examine: Examine, batches: Iterable[Sequence[str]]) -> Iterator[list[Examined]]:
    """Examine the batches one after another in this process."""
    return map(examine, batches)


@dataclass(frozen=True, kw_only=True)
class Cleaned(Source):
    """The documents of another source that pass the quality bounds, without duplicates.

    It is a source like any other: pass it to `prepare_corpus`, which caches the result. The ``skipped`` report of the corpus
    counts the documents that were left out, by reason. Duplicates are searched only within the source; the first copy is kept.

    Attributes:
        source: The source to filter.
        quality: The bounds a document must meet.
        duplicates: Whether to leave out a document whose text appeared before, ignoring case and white space.
        near_duplicates: When to leave out a document that resembles an earlier one; None keeps all of them.
        run: What examines the documents: by default this process; ``effscale.data.cleaning.ray_runner`` uses a Ray cluster.

    Example:
        >>> from effscale.data import StandardLibrary
        >>> from effscale.data.documents import SkipReport
        >>> report = SkipReport()
        >>> source = Cleaned(source=StandardLibrary(), quality=Quality(min_characters=100_000))
        >>> documents = list(source.documents(report, log=False))
        >>> len(documents) + report.total == len(list(StandardLibrary().documents()))
        True
    """

    source: Source
    quality: Quality = Quality()
    duplicates: bool = True
    near_duplicates: NearDuplicates | None = None
    run: Runner = field(default=local_runner, compare=False)
    _log_level: ClassVar[int] = logging.INFO

    def __post_init__(self):
        super().__post_init__()
        if self.on_error != "raise":
            raise ValueError(
                f'on_error must be "raise" here, got {self.on_error!r}. Set on_error on the source that is cleaned, which reads the documents.'
            )

    def _read(self, skipped: SkipReport) -> Iterator[Document]:
        index = None if self.near_duplicates is None else self.near_duplicates.index()
        seen: set[bytes] = set()
        documents = self.source.documents(skipped)  # it warns about unreadable documents itself
        for document, found in self._examined(documents):
            fault = found.fault
            if fault is None and self.duplicates and found.digest in seen:
                fault = "duplicate", "the same text appeared before"
            if fault is None and _resembles(index, found.signature):
                fault = "near_duplicate", "it resembles an earlier document"
            if fault is None:
                seen.add(found.digest)
                yield document
            else:
                skipped.add(fault[0], document.source, fault[1])

    def _examined(self, documents: Iterator[Document]) -> Iterator[tuple[Document, Examined]]:
        waiting: list[Document] = []

        def batches() -> Iterator[list[str]]:
            while batch := list(itertools.islice(documents, BATCH)):
                waiting.extend(batch)
                yield [document.text for document in batch]

        for results in self.run(self.examine, batches()):
            ready, waiting[: len(results)] = waiting[: len(results)], []
            yield from zip(ready, results, strict=True)

    def examine(self, texts: Sequence[str]) -> list[Examined]:
        """Run the checks that look at one text at a time."""
        near = self.near_duplicates
        found = []
        for text in texts:
            fault = self.quality.fault(text)
            signature = None if near is None or fault is not None else near.signature(text)
            found.append(Examined(fault, digest(text), signature))
        return found

    def spec(self) -> str:
        """Return the string form of the filtered source."""
        return self.source.spec()

    def fingerprint(self) -> dict[str, Any]:
        """Return the fingerprint of the filtered source, with the filter settings."""
        near = self.near_duplicates
        return {
            "version": 1,
            "cleaned": self.source.fingerprint(),
            "quality": asdict(self.quality),
            "duplicates": self.duplicates,
            "near_duplicates": None if near is None else asdict(near),
        }


def _resembles(index: NearDuplicateIndex | None, signature: np.ndarray | None) -> bool:
    return index is not None and signature is not None and index.add(signature)
