"""Parse dialogues written as one text, ``Human: ... Assistant: ...``, as in HH-RLHF and datasets derived from it."""

import re

from effscale.rlhf.data.record import Message

ROLES = {"Human": "user", "Assistant": "assistant"}

# A turn begins a text or a paragraph, or, as in DeepSpeed-Chat's own format, follows a space at the beginning of the text.
_TURN = re.compile(r"(?:\A\s*|\n\s*\n\s*)(Human|Assistant):")


def is_dialogue(text: str) -> bool:
    """Return whether a text begins with a turn of ``Human:`` or ``Assistant:``."""
    return _TURN.match(text) is not None


def parse_dialogue(text: str) -> tuple[Message, ...]:
    r"""Parse the turns of a dialogue, without surrounding white space.

    An empty last turn of the assistant, which asks for a response, does not become a message.

    Args:
        text: The turns, each introduced by ``Human:`` or ``Assistant:`` at the beginning of the text or after an
            empty line.

    Raises:
        ValueError: The text begins with something else.

    Example:
        >>> parse_dialogue("\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: Bye!\n\nAssistant:")
        (Message(role='user', content='Hi!'), Message(role='assistant', content='Hello.'), Message(role='user', content='Bye!'))
    """
    if not is_dialogue(text):
        raise ValueError(f"a dialogue must begin with 'Human:' or 'Assistant:', got {text[:60]!r}")
    turns = list(_TURN.finditer(text))
    ends = [*(turn.start() for turn in turns[1:]), len(text)]
    messages = [
        Message(ROLES[turn[1]], text[turn.end() : end].strip())
        for turn, end in zip(turns, ends, strict=True)
    ]
    if len(messages) > 1 and messages[-1] == Message("assistant", ""):
        messages.pop()
    return tuple(messages)


def split_pair(chosen: str, rejected: str) -> tuple[str, str, str] | None:
    r"""Split two dialogues into their common beginning, up to an assistant's turn, and the rest of each.

    Args:
        chosen: A dialogue.
        rejected: Another dialogue with the same beginning.

    Returns:
        The common text, which ends in ``Assistant:``, and the rest of each; None if they have no common turn of the
        assistant.

    Example:
        >>> split_pair("\n\nHuman: Hi!\n\nAssistant: Hello.", "\n\nHuman: Hi!\n\nAssistant: Hmpf.")
        ('\n\nHuman: Hi!\n\nAssistant:', ' Hello.', ' Hmpf.')
    """
    same = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
        min(len(chosen), len(rejected)),
    )
    ends = [t.end() for t in _TURN.finditer(chosen) if t[1] == "Assistant" and t.end() <= same]
    if not ends:
        return None
    return chosen[: ends[-1]], chosen[ends[-1] :], rejected[ends[-1] :]
