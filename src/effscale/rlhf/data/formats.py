"""Published formats of instructions and preferences: a function for each from a row to a ``Record``, and format
detection.

A row is any mapping from field names to values: a line of JSON, a row of Parquet, an item of a Hugging Face dataset.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from effscale.rlhf.data.dialogue import is_dialogue, parse_dialogue, split_pair
from effscale.rlhf.data.record import (
    Message,
    Record,
    RecordError,
    field,
    messages_of,
    text_field,
    text_of,
)

Converter = Callable[[Mapping[str, Any]], Record]

SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
}
"""Roles by the names that occur in ShareGPT's format."""

_CITATION = re.compile(r"\s*\[\d+(?:\s*,\s*\d+)*\]")


def hh_rlhf(row: Mapping[str, Any]) -> Record:
    r"""Convert Anthropic's HH-RLHF: ``chosen`` and ``rejected`` are whole dialogues of ``Human:`` and ``Assistant:``.

    The prompt is their common part, up to the assistant's turn in which they differ, as messages.

    Raises:
        RecordError: A field is missing or is not a dialogue, or the dialogues differ before their last turn, so that
            it is unknown which of the following turns was preferred.

    Example:
        >>> same = "\n\nHuman: Name a color.\n\nAssistant:"
        >>> hh_rlhf({"chosen": same + " Blue.", "rejected": same + " No."})
        Record(prompt=(Message(role='user', content='Name a color.'),), chosen='Blue.', rejected='No.')
    """
    chosen, rejected = text_field(row, "chosen"), text_field(row, "rejected")
    parts = split_pair(chosen, rejected)
    if parts is None:
        raise RecordError(
            "diverging",
            "chosen and rejected have no common turn 'Assistant:'",
        )
    prompt, *responses = parts
    if any(re.search(r"\n\s*\n(Human|Assistant):", response) for response in responses):
        raise RecordError("diverging", "chosen and rejected differ before their last turn")
    chosen, rejected = (response.strip() for response in responses)
    return Record(prompt=_dialogue(prompt), chosen=chosen, rejected=rejected)


def rm_static(row: Mapping[str, Any]) -> Record:
    """Convert Dahoas/rm-static and full-hh-rlhf: ``prompt`` is a dialogue that ends in ``Assistant:``, which
    ``chosen`` and ``rejected`` continue.

    The prompt becomes messages; the chat format ``hh_rlhf`` restores the original text.
    """
    prompt = _dialogue(text_field(row, "prompt"))
    chosen, rejected = (text_field(row, name).strip() for name in ("chosen", "rejected"))
    return Record(prompt=prompt, chosen=chosen, rejected=rejected)


def dpo(row: Mapping[str, Any]) -> Record:
    """Convert pairs in the format of DPO trainers: ``prompt``, ``chosen`` and ``rejected`` are texts or lists of
    messages.

    If they are lists, ``chosen`` and ``rejected`` may repeat the prompt's messages before the response; ``prompt`` is
    then optional. Texts are used unchanged, including white space.

    Raises:
        RecordError: Texts and messages are mixed so that the prompt is ambiguous, or the two lists differ before
            their last message.
    """
    chosen, rejected = field(row, "chosen"), field(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt = field(row, "prompt")
        if not isinstance(prompt, str):
            prompt = messages_of(prompt, "prompt")
        return Record(prompt=prompt, chosen=chosen, rejected=rejected)
    before, chosen = _response(chosen, "chosen")
    before_rejected, rejected = _response(rejected, "rejected")
    if before != before_rejected:
        raise RecordError("diverging", "chosen and rejected differ before their last message")
    prompt = before
    if not before:
        given = field(row, "prompt")
        prompt = (
            (Message("user", given),) if isinstance(given, str) else messages_of(given, "prompt")
        )
    return Record(prompt=prompt, chosen=chosen, rejected=rejected)


def instruction(row: Mapping[str, Any]) -> Record:
    """Convert a ``prompt`` with at most one answer: ``completion``, ``response``, ``answer`` or ``chosen``, if present."""
    prompt = field(row, "prompt")
    if not isinstance(prompt, str):
        prompt = messages_of(prompt, "prompt")
    for name in ("completion", "response", "answer", "chosen"):
        if row.get(name) is not None:
            value = row[name]
            chosen = value if isinstance(value, str) else _response(value, name)[1]
            return Record(prompt=prompt, chosen=chosen)
    return Record(prompt=prompt)


def alpaca(row: Mapping[str, Any]) -> Record:
    r"""Convert Alpaca: ``instruction``, ``input`` (often empty) and ``output``, or ``chosen`` and ``rejected`` in its
    place.

    If present, ``system`` and ``history`` (pairs of earlier questions and answers) are read too.

    Example:
        >>> alpaca({"instruction": "Translate.", "input": "Haus", "output": "house"})
        Record(prompt=(Message(role='user', content='Translate.\n\nHaus'),), chosen='house', rejected=None)
    """
    said = text_field(row, "instruction")
    if row.get("input"):
        said = f"{said}\n\n{text_field(row, 'input')}"
    messages = [Message("system", text_field(row, "system"))] if row.get("system") else []
    for turn in row.get("history") or ():
        if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2:
            raise RecordError("wrong_type", "the field 'history' must be a list of pairs of texts")
        for role, content in zip(("user", "assistant"), turn, strict=True):
            messages.append(Message(role, text_of(content, "history")))
    prompt = (*messages, Message("user", said))
    if "output" not in row and "chosen" in row:
        chosen, rejected = text_field(row, "chosen"), text_field(row, "rejected")
        return Record(prompt=prompt, chosen=chosen, rejected=rejected)
    return Record(prompt=prompt, chosen=text_field(row, "output"))


def sharegpt(row: Mapping[str, Any]) -> Record:
    """Convert ShareGPT: ``conversations`` of ``from`` and ``value``; the assistant's last turn is the response.

    If present, ``system`` is read too, and ``chosen`` and ``rejected``, one more turn each, which form a pair.

    Example:
        >>> sharegpt({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]})
        Record(prompt=(Message(role='user', content='Hi'),), chosen='Hello', rejected=None)
    """
    turns = messages_of(field(row, "conversations"), "conversations", role="from", content="value")
    for i, turn in enumerate(turns):
        if turn.role not in SHAREGPT_ROLES:
            raise RecordError(
                "wrong_type",
                f"conversations[{i}].from must be one of {', '.join(SHAREGPT_ROLES)}, got {turn.role!r}",
            )
    messages = [Message(SHAREGPT_ROLES[turn.role], turn.content) for turn in turns]
    if row.get("system"):
        messages.insert(0, Message("system", text_field(row, "system")))
    if "chosen" in row and "rejected" in row:
        pair = [
            row[name]
            if isinstance(row[name], str)
            else messages_of([row[name]], name, role="from", content="value")[0].content
            for name in ("chosen", "rejected")
        ]
        return Record(prompt=tuple(messages), chosen=pair[0], rejected=pair[1])
    return _conversation(messages, "conversations")


def messages(row: Mapping[str, Any]) -> Record:
    """Convert ``messages`` of ``role`` and ``content``; the assistant's last message is the response."""
    return _conversation(list(messages_of(field(row, "messages"), "messages")), "messages")


def webgpt(row: Mapping[str, Any]) -> Record:
    """Convert openai/webgpt_comparisons: ``question``, two answers and their scores; the one with the higher score is
    preferred.

    Citations such as ``[1]`` and ``[2, 3]`` are removed. DeepSpeed-Chat removes everything in parentheses or square
    brackets, and prefers the first of two answers with equal scores; here a tie is left out.

    Raises:
        RecordError: A field is missing, or the scores are equal.
    """
    question = field(row, "question")
    if isinstance(question, Mapping):
        question = text_field(question, "full_text")
    first, second = (_number(row, f"score_{i}") for i in (0, 1))
    if first == second:
        raise RecordError("tie", f"both answers have the score {first:g}")
    answers = [_CITATION.sub("", text_field(row, f"answer_{i}")).strip() for i in (0, 1)]
    chosen, rejected = answers if first > second else answers[::-1]
    prompt = (Message("user", text_of(question, "question")),)
    return Record(prompt=prompt, chosen=chosen, rejected=rejected)


def shp(row: Mapping[str, Any]) -> Record:
    """Convert stanfordnlp/SHP: a post ``history`` and two replies; A is preferred if ``labels`` is 1, B if it is 0."""
    label = _number(row, "labels")
    if label not in (0, 1):
        raise RecordError("wrong_type", f"the field 'labels' must be 0 or 1, got {label:g}")
    replies = [text_field(row, f"human_ref_{name}") for name in "AB"]
    chosen, rejected = replies if label == 1 else replies[::-1]
    prompt = (Message("user", text_field(row, "history")),)
    return Record(prompt=prompt, chosen=chosen, rejected=rejected)


def named_fields(
    *, prompt: str, chosen: str | None = None, rejected: str | None = None
) -> Converter:
    """Return a converter for rows with custom field names; texts and messages are handled as in ``dpo``.

    Args:
        prompt: The field of the prompt.
        chosen: The field of the response to learn; None if there is none.
        rejected: The field of the other response.

    Example:
        >>> named_fields(prompt="question", chosen="best")({"question": "2 + 2?", "best": "4"})
        Record(prompt='2 + 2?', chosen='4', rejected=None)
    """
    if rejected is not None and chosen is None:
        raise ValueError(
            f"rejected must be None if chosen is None, got {rejected!r}: a pair needs both"
        )
    given = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    names = {ours: theirs for ours, theirs in given.items() if theirs is not None}
    converter = dpo if rejected is not None else instruction

    def convert(row: Mapping[str, Any]) -> Record:
        return converter({ours: field(row, theirs) for ours, theirs in names.items()})

    return convert


class _Format(NamedTuple):
    convert: Converter
    fields: str
    fits: Callable[[Mapping[str, Any]], bool]


def _has(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda row: all(name in row for name in names)


def _texts(row: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(row.get(name), str) for name in names)


_FORMATS = {
    "shp": _Format(shp, "history, human_ref_A, human_ref_B, labels", _has("history", "human_ref_A", "human_ref_B", "labels")),
    "webgpt": _Format(webgpt, "question, answer_0, answer_1, score_0, score_1", _has("question", "answer_0", "score_0")),
    "sharegpt": _Format(sharegpt, "conversations", _has("conversations")),
    "alpaca": _Format(
        alpaca,
        "instruction, output",
        lambda row: "instruction" in row and ("output" in row or "chosen" in row),
    ),
    "rm_static": _Format(
        rm_static,
        "prompt (ending in 'Assistant:'), chosen, rejected",
        lambda row: _texts(row, "prompt", "chosen", "rejected")
        and is_dialogue(row["prompt"])
        and row["prompt"].rstrip().endswith("Assistant:"),
    ),
    "hh_rlhf": _Format(
        hh_rlhf,
        "chosen, rejected (whole dialogues)",
        lambda row: "prompt" not in row and _texts(row, "chosen", "rejected") and is_dialogue(row["chosen"]),
    ),
    "dpo": _Format(
        dpo,
        "prompt, chosen, rejected",
        lambda row: _has("chosen", "rejected")(row)
        and ("prompt" in row or not _texts(row, "chosen", "rejected")),
    ),
    "messages": _Format(messages, "messages", _has("messages")),
    "instruction": _Format(instruction, "prompt", _has("prompt")),
}  # fmt: skip

FORMATS: Mapping[str, Converter] = {name: form.convert for name, form in _FORMATS.items()}
"""The converters, by name."""


def detect_format(row: Mapping[str, Any]) -> str:
    """Return the name of the format that matches a row's fields, a key of ``FORMATS``.

    Raises:
        RecordError: No format matches; the message lists the fields that were found, and those of each format.

    Example:
        >>> detect_format({"instruction": "Say hello.", "input": "", "output": "Hello."})
        'alpaca'
    """
    for name, form in _FORMATS.items():
        if form.fits(row):
            return name
    found = ", ".join(repr(key) for key in list(row)[:20]) or "none"
    known = "; ".join(f"{name}: {form.fields}" for name, form in _FORMATS.items())
    raise RecordError(
        "missing_field",
        f"no known format has the fields {found} ({known}). Specify yours with format=named_fields(prompt=..., chosen=..., rejected=...)",
    )


def _dialogue(text: str) -> tuple[Message, ...]:
    try:
        return parse_dialogue(text)
    except ValueError as error:
        raise RecordError("wrong_type", f"the prompt: {error}") from None


def _response(value: Any, name: str) -> tuple[tuple[Message, ...], str]:
    """Return the messages before the last one, and the content of the last one, which must be the assistant's."""
    if isinstance(value, str):
        return (), text_of(value, name)
    listed = messages_of([value] if isinstance(value, Mapping) else value, name)
    if listed[-1].role != "assistant":
        raise RecordError(
            "wrong_type",
            f"the last message of {name!r} must have the role 'assistant', got {listed[-1].role!r}",
        )
    return listed[:-1], listed[-1].content


def _conversation(listed: list[Message], name: str) -> Record:
    last = max((i for i, m in enumerate(listed) if m.role == "assistant"), default=0)
    if not last:
        raise RecordError(
            "empty", f"the field {name!r} has no answer of the assistant to a message"
        )
    return Record(prompt=tuple(listed[:last]), chosen=listed[last].content)


def _number(row: Mapping[str, Any], name: str) -> float:
    value = field(row, name)
    if isinstance(value, bool):
        value = int(value)
    if not isinstance(value, int | float) or value != value:
        raise RecordError("wrong_type", f"the field {name!r} must be a number, got {value!r}")
    return float(value)
