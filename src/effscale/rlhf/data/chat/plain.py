"""Chat formats in plain words, for tokenizers without a template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from effscale.rlhf.data.record import Message


@dataclass(frozen=True, kw_only=True)
class PlainFormat:
    r"""A word before each turn.

    Attributes:
        user: What stands before a user's words.
        assistant: What asks for a response: the end of every prompt.
        response: What stands before a response, after ``assistant``. A prompt does not end in it: tokenizers put a space to the
            word that follows.
        system: What stands before the words of the system.

    Example:
        >>> PLAIN_FORMATS["deepspeed_chat"].prompt([Message("user", "Name a colour.")])
        ' Human: Name a colour. Assistant:'
    """

    user: str
    assistant: str
    response: str = " "
    system: str = ""

    parses_special_tokens = False
    """Whether names of special tokens in what it gives mean those tokens."""

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text of a prompt, up to where the response begins.

        Raises:
            ValueError: A message has another role than user, assistant and system.
        """
        before = {
            "user": self.user,
            "assistant": self.assistant + self.response,
            "system": self.system,
        }
        for message in messages:
            if message.role not in before:
                raise ValueError(
                    f"the role {message.role!r}: a plain format knows {', '.join(before)}"
                )
        return "".join(before[m.role] + m.content for m in messages) + self.assistant

    def answer(self, messages: Sequence[Message], response: str) -> str:
        """The text of a response to a prompt, which goes on where the prompt's text ends."""
        del messages
        return self.response + response


PLAIN_FORMATS: Mapping[str, PlainFormat] = {
    "deepspeed_chat": PlainFormat(user=" Human: ", assistant=" Assistant:"),
    "hh_rlhf": PlainFormat(user="\n\nHuman: ", assistant="\n\nAssistant:"),
}
"""DeepSpeed-Chat's format, and that of Anthropic's HH-RLHF, which rm-static has kept."""
