"""Documents, the sources that yield them, and reports of documents that were left out."""

import abc
import collections
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from effscale.options import Options

logger = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
Reason = Literal[
    "unreadable",
    "empty",
    "not_utf8",
    "bad_json",
    "missing_field",
    "not_text",
    "short",
    "repetitive",
    "language",
    "duplicate",
    "near_duplicate",
]


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a corpus. Splits never divide a document, and each gets its own segment id.

    Attributes:
        text: The content.
        source: Where it came from, for messages: a path, a path and line, or a topic.
    """

    text: str
    source: str


class DocumentError(ValueError):
    """An unusable document in a source with ``on_error="raise"``.

    Attributes:
        where: The file, and the line or row if there is one.
        reason: The kind of fault, which is also the key of skipped documents in a `SkipReport`.
    """

    def __init__(self, reason: Reason, where: str, detail: str):
        super().__init__(
            f"{where}: {detail}. Fix or remove this input, "
            'or pass on_error="skip" to count such documents and continue.'
        )
        self.reason = reason
        self.where = where


@dataclass
class SkipReport:
    """A count of the documents that were left out.

    Attributes:
        counts: The number of documents by reason.
        examples: Descriptions of the first few.
        max_examples: The number of examples to keep.

    >>> report = SkipReport()
    >>> report.add("empty", "notes.txt", "the file is empty")
    >>> report.total, dict(report.counts), report.examples
    (1, {'empty': 1}, ['notes.txt: the file is empty'])
    >>> print(report)
    1 documents skipped (1 empty), e.g. notes.txt: the file is empty
    """

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    examples: list[str] = field(default_factory=list)
    max_examples: int = 5

    @property
    def total(self) -> int:
        """The number of documents left out."""
        return self.counts.total()

    def __str__(self) -> str:
        if not self.total:
            return "no documents skipped"
        counts = ", ".join(f"{n} {reason}" for reason, n in self.counts.most_common())
        return f"{self.total} documents skipped ({counts}), e.g. {'; '.join(self.examples)}"

    def add(self, reason: Reason, where: str, detail: str) -> None:
        """Count one document that was left out."""
        self.counts[reason] += 1
        if len(self.examples) < self.max_examples:
            self.examples.append(f"{where}: {detail}")

    def merge(self, other: "SkipReport") -> None:
        """Add another report to this one."""
        self.counts.update(other.counts)
        self.examples.extend(other.examples[: self.max_examples - len(self.examples)])

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values, as stored in manifests."""
        return {"counts": dict(sorted(self.counts.items())), "examples": list(self.examples)}


@dataclass(frozen=True, kw_only=True)
class Source(Options, abc.ABC):
    """The base class of corpora: a frozen dataclass whose documents can be read any number of times.

    A subclass implements ``_read``, ``spec`` and ``fingerprint``.

    Attributes:
        on_error: What to do with a document that is unreadable, empty, not UTF-8 or missing its
            field: ``"raise"`` a `DocumentError`, or ``"skip"`` and count it.
    """

    on_error: OnError = "raise"
    _log_level: ClassVar[int] = logging.WARNING

    def documents(
        self, report: SkipReport | None = None, *, log: bool = True
    ) -> Iterator[Document]:
        """Yield the documents in an order that depends only on the source.

        Args:
            report: Receives the counts of documents left out; complete once the iterator is exhausted.
            log: Whether to log the counts with the first few examples. The log level is warning, except for sources whose
                purpose is to leave out documents.

        Raises:
            DocumentError: A document cannot be used and ``on_error`` is ``"raise"``.
        """
        skipped = SkipReport()
        try:
            yield from self._read(skipped)
        finally:
            if skipped.total and log:
                logger.log(self._log_level, "%s: %s", self.spec(), skipped)
            if report is not None:
                report.merge(skipped)

    @abc.abstractmethod
    def _read(self, skipped: SkipReport) -> Iterator[Document]:
        """Yield the documents and pass every unusable one to `_fault`."""

    @abc.abstractmethod
    def spec(self) -> str:
        """Return the source in the string form that `parse_source` reads."""

    @abc.abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Return what the content depends on, as plain values; cache keys are made from it."""

    def _fault(self, skipped: SkipReport, reason: Reason, where: str, detail: str) -> None:
        if self.on_error == "raise":
            raise DocumentError(reason, where, detail)
        skipped.add(reason, where, detail)

    def _accept(self, skipped: SkipReport, text: object, where: str) -> Iterator[Document]:
        """Yield the document, or pass it to `_fault` if it is not a nonempty text."""
        if not isinstance(text, str):
            self._fault(skipped, "not_text", where, f"{type(text).__name__} instead of text")
        elif not text or text.isspace():
            self._fault(skipped, "empty", where, "the document is empty")
        elif not _is_unicode(text):
            self._fault(skipped, "not_utf8", where, "the text contains a lone surrogate")
        else:
            yield Document(text, where)


def _is_unicode(text: str) -> bool:
    # JSON escapes can spell half of a surrogate pair, which UTF-8 cannot represent.
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
