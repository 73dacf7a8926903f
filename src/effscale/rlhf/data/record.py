"""Records of a preference dataset: a prompt, the preferred response, and another response."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from effscale.data import SkipReport

Reason = Literal[
    "unreadable",
    "bad_json",
    "not_utf8",
    "missing_field",
    "wrong_type",
    "empty",
    "identical",
    "tie",
    "diverging",
    "special_token",
    "too_long",
]
"""Why a record is rejected or left out."""


class RecordError(ValueError):
    """A record cannot be used.

    Attributes:
        reason: The kind of fault.
        detail: A description of the fault.
    """

    def __init__(self, reason: Reason, detail: str, where: str = ""):
        super().__init__(f"{where}: {detail}" if where else detail)
        self.reason: Reason = reason
        self.detail = detail


class RecordReport(SkipReport):
    """Counts of records that were left out, by reason, with the first few as examples.

    Example:
        >>> report = RecordReport()
        >>> report.add("identical", "pairs.jsonl:7", "chosen and rejected are the same")
        >>> print(report)
        1 record left out (1 identical), e.g. pairs.jsonl:7: chosen and rejected are the same
    """

    def add(self, reason: Reason, where: str, detail: str) -> None:  # pyrefly: ignore[bad-override]
        """Count one record."""
        self.counts[reason] += 1
        if len(self.examples) < self.max_examples:
            self.examples.append(f"{where}: {detail}")

    def __str__(self) -> str:
        if not self.total:
            return "no records left out"
        counts = ", ".join(f"{n} {reason}" for reason, n in self.counts.most_common())
        noun = "record" if self.total == 1 else "records"
        return f"{self.total} {noun} left out ({counts}), e.g. {'; '.join(self.examples)}"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: ``"user"``, ``"assistant"``, ``"system"``, or another role that the chat template knows.
        content: The text of the message.
    """

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """A prompt and up to two responses to it.

    Attributes:
        prompt: Messages (or mappings with ``role`` and ``content``, which become messages), to which a chat format is
            applied; or a text that is used unchanged.
        chosen: The response to learn, or the preferred one of a pair. None for a prompt that a model should answer.
        rejected: The other response of a pair.

    Raises:
        RecordError: A value is not a text, or there is no message.

    Example:
        >>> record = Record(prompt=[{"role": "user", "content": "2 + 2?"}], chosen="4", rejected="5")
        >>> record.prompt
        (Message(role='user', content='2 + 2?'),)
    """

    prompt: str | Sequence[Message | Mapping[str, Any]]
    chosen: str | None = None
    rejected: str | None = None

    def __post_init__(self):
        if isinstance(self.prompt, str):
            text_of(self.prompt, "prompt")
        else:
            object.__setattr__(self, "prompt", messages_of(self.prompt, "prompt"))
        for name in ("chosen", "rejected"):
            if getattr(self, name) is not None:
                text_of(getattr(self, name), name)

    @property
    def messages(self) -> tuple[Message, ...] | None:
        """The prompt's messages; None if it is a text."""
        return None if isinstance(self.prompt, str) else messages_of(self.prompt, "prompt")

    def as_text(self) -> str:
        """The prompt's text without a chat format, used to compare prompts."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(m.content for m in messages_of(self.prompt, "prompt"))


def fault(record: Record) -> tuple[Reason, str] | None:
    """Return why nothing can be learned from a record (an empty text or equal responses), or None."""
    if not record.as_text().strip():
        return "empty", "the prompt is empty"
    for name in ("chosen", "rejected"):
        text = getattr(record, name)
        if text is not None and not text.strip():
            return "empty", f"the {name} response is empty"
    if record.chosen is not None and record.chosen == record.rejected:
        return "identical", "chosen and rejected are the same"
    return None


def field(row: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field.

    Raises:
        RecordError: The field is missing; the message lists the fields that exist.
    """
    if name not in row:
        there = ", ".join(repr(key) for key in list(row)[:12]) or "none"
        raise RecordError("missing_field", f"no field {name!r}; the fields are {there}")
    return row[name]


def text_field(row: Mapping[str, Any], name: str) -> str:
    """Return the text of a field; see ``field`` and ``text_of``."""
    return text_of(field(row, name), name)


def text_of(value: Any, name: str) -> str:
    """Return a value after checking that it is a text.

    Raises:
        RecordError: It is something else, or contains half of a surrogate pair, which tokenizers do not accept.
    """
    if not isinstance(value, str):
        raise RecordError("wrong_type", f"the field {name!r} must be a text, got {_kind(value)}")
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError:
        raise RecordError("not_utf8", f"the field {name!r} contains a lone surrogate") from None
    return value


def messages_of(
    value: Any, name: str, *, role: str = "role", content: str = "content"
) -> tuple[Message, ...]:
    """Convert a list of mappings with role and content to messages.

    Other keys, such as ids, are ignored. Contents in parts are joined if all parts are text.

    Raises:
        RecordError: It is not such a list, or a message calls tools or contains an image.
    """
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise RecordError(
            "wrong_type",
            f"the field {name!r} must be a list of messages, got {_kind(value)}",
        )
    if not value:
        raise RecordError("empty", f"the field {name!r} has no message")
    return tuple(
        item if isinstance(item, Message) else _message(item, f"{name}[{i}]", role, content)
        for i, item in enumerate(value)
    )


def _message(item: Any, where: str, role: str, content: str) -> Message:
    if not isinstance(item, Mapping):
        raise RecordError("wrong_type", f"{where} must be a message, got {_kind(item)}")
    for key in (role, content):
        if key not in item:
            raise RecordError(
                "missing_field",
                f"{where} has no {key!r}; its keys are {', '.join(map(repr, item))}",
            )
    if item.get("tool_calls"):
        raise RecordError("wrong_type", f"{where} calls tools, but only text is supported")
    said = item[content]
    if isinstance(said, list):
        parts = [part for part in said if isinstance(part, Mapping) and part.get("type") == "text"]
        if len(parts) < len(said):
            raise RecordError("wrong_type", f"{where} has parts that are not text")
        said = "".join(text_of(part.get("text"), f"{where}.text") for part in parts)
    return Message(text_of(item[role], f"{where}.{role}"), text_of(said, f"{where}.{content}"))


def _kind(value: Any) -> str:
    return "null" if value is None else f"a value of type {type(value).__name__}"
