"""What every corpus is made of: documents, the sources that yield them, and the account of what was left out."""

import abc
import collections
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

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
    """One document of a corpus, the unit that splits and segment ids respect.

    Attributes:
        text: The content.
        source: Where it came from, for messages: a path, a path and line, a topic.
    """

    text: str
    source: str


class DocumentError(ValueError):
    """A document that cannot be used, met by a source with ``on_error="raise"``.

    Attributes:
        where: The file, and the line or row where there is one.
        reason: The kind of fault, the key under which a skip would be counted.
    """

    def __init__(self, reason: Reason, where: str, detail: str):
        super().__init__(
            f"{where}: {detail}. Mend or leave out this input, "
            'or pass on_error="skip" to count such documents and go on.'
        )
        self.reason = reason
        self.where = where


@dataclass
class SkipReport:
    """The account of the documents that were left out.

    Attributes:
        counts: How many, by reason.
        examples: The first few, in words.
        max_examples: How many examples to keep.

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
        """Counts one document that was left out."""
        self.counts[reason] += 1
        if len(self.examples) < self.max_examples:
            self.examples.append(f"{where}: {detail}")

    def merge(self, other: "SkipReport") -> None:
        """Adds another report to this one."""
        self.counts.update(other.counts)
        self.examples.extend(other.examples[: self.max_examples - len(self.examples)])

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values, as manifests hold it."""
        return {"counts": dict(sorted(self.counts.items())), "examples": list(self.examples)}


@dataclass(frozen=True, kw_only=True)
class Source(abc.ABC):
    """A corpus as a configuration: a frozen dataclass whose documents can be read any number of times.

    A subclass implements ``_read``, ``spec`` and ``fingerprint``.

    Attributes:
        on_error: What to do with a document that is unreadable, empty, not UTF-8 or lacks its
            field: ``"raise"`` a `DocumentError`, or ``"skip"`` and count it.
    """

    on_error: OnError = "raise"
    _log_level: ClassVar[int] = logging.WARNING

    def __post_init__(self):
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f'on_error={self.on_error!r}: it must be "raise" or "skip".')

    def documents(
        self, report: SkipReport | None = None, *, log: bool = True
    ) -> Iterator[Document]:
        """Yields the documents in an order that depends on nothing but the source.

        Args:
            report: Receives the count of documents left out, complete once the iterator has ended.
            log: Whether to log that count, with the first few documents: as a warning, unless leaving out is what the source is for.

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
        """Yields the documents and hands every unusable one to `_fault`."""

    @abc.abstractmethod
    def spec(self) -> str:
        """The source in the string form that `parse_source` reads."""

    @abc.abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What the content depends on, as plain values: caches are keyed by it."""

    def _fault(self, skipped: SkipReport, reason: Reason, where: str, detail: str) -> None:
        if self.on_error == "raise":
            raise DocumentError(reason, where, detail)
        skipped.add(reason, where, detail)

    def _accept(self, skipped: SkipReport, text: object, where: str) -> Iterator[Document]:
        """Yields the document, or hands it to `_fault` if it is not a text with content."""
        if not isinstance(text, str):
            self._fault(
                skipped, "not_text", where, f"{type(text).__name__} where text was expected"
            )
        elif not text or text.isspace():
            self._fault(skipped, "empty", where, "the document is empty")
        elif not _is_unicode(text):
            self._fault(skipped, "not_utf8", where, "the text holds a lone surrogate")
        else:
            yield Document(text, where)


def _is_unicode(text: str) -> bool:
    # JSON escapes can spell half of a surrogate pair, which no UTF-8 file can hold.
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
