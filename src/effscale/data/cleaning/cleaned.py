"""A source without the documents that are not wanted."""

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
"""Documents that are examined together."""


class Examined(NamedTuple):
    """What is asked of each document by itself, and so of many at a time.

    Attributes:
        fault: Of its quality.
        digest: By which it equals others.
        signature: By which it resembles others.
    """

    fault: tuple[Reason, str] | None
    digest: bytes
    signature: np.ndarray | None


Examine = Callable[[Sequence[str]], list[Examined]]
Runner = Callable[[Examine, Iterable[Sequence[str]]], Iterator[list[Examined]]]
"""Examines batches of texts, in their order."""


def local_runner(examine: Examine, batches: Iterable[Sequence[str]]) -> Iterator[list[Examined]]:
    """Examines in this process, one batch after another."""
    return map(examine, batches)


@dataclass(frozen=True, kw_only=True)
class Cleaned(Source):
    """The documents of another source that are good enough, and of equal or similar ones the first.

    It is a source like any other: `prepare_corpus` takes it, keeps the result, and the corpus's ``skipped`` says how many documents
    were left out, by reason. Duplicates are looked for within the source only.

    Attributes:
        source: The other source.
        quality: What a document has to be like.
        duplicates: Whether to leave out a document whose text was there before, but for upper case and white space.
        near_duplicates: Whether, and from which similarity on, to leave out one that resembles an earlier document; None keeps it.
        run: Who examines documents: by default this process; :func:`effscale.data.cleaning.ray_runner` gives them to a cluster.

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
                f"on_error={self.on_error!r}: give it to the source that is cleaned, which reads the documents"
            )

    def _read(self, skipped: SkipReport) -> Iterator[Document]:
        index = None if self.near_duplicates is None else self.near_duplicates.index()
        seen: set[bytes] = set()
        documents = self.source.documents(skipped)  # which warns of what it cannot read itself
        for document, found in self._examined(documents):
            fault = found.fault
            if fault is None and self.duplicates and found.digest in seen:
                fault = "duplicate", "the same text was there before"
            if fault is None and _resembles(index, found.signature):
                fault = "near_duplicate", "it resembles a document before it"
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
        """What is asked of each text by itself."""
        near = self.near_duplicates
        found = []
        for text in texts:
            fault = self.quality.fault(text)
            signature = None if near is None or fault is not None else near.signature(text)
            found.append(Examined(fault, digest(text), signature))
        return found

    def spec(self) -> str:
        """The other source in its string form."""
        return self.source.spec()

    def fingerprint(self) -> dict[str, Any]:
        """That of the other source, and what is asked of documents."""
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
