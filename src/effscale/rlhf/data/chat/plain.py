"""Plain-text chat formats, for tokenizers without a template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from effscale.rlhf.data.record import Message


@dataclass(frozen=True, kw_only=True)
class PlainFormat:
    r"""A chat format that marks each turn with a prefix.

    Attributes:
        user: Prefix of a user's message.
        assistant: Prefix that asks for a response; every prompt ends with it.
        response: Text between ``assistant`` and a response. A prompt does not end with it, because tokenizers attach
            a space to the word that follows.
        system: Prefix of a system message.

    Example:
        >>> PLAIN_FORMATS["deepspeed_chat"].prompt([Message("user", "Name a color.")])
        ' Human: Name a color. Assistant:'
    """

    user: str
    assistant: str
    response: str = " "
    system: str = ""

    parses_special_tokens = False
    """Whether names of special tokens in the output represent those tokens."""

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the text of a prompt, up to where the response begins.

        Raises:
            ValueError: A message has a role other than user, assistant and system.
        """
        before = {
            "user": self.user,
            "assistant": self.assistant + self.response,
            "system": self.system,
        }
        for message in messages:
            if message.role not in before:
                raise ValueError(
                    f"role must be one of {', '.join(before)} in a plain format, got {message.role!r}"
                )
        return "".join(before[m.role] + m.content for m in messages) + self.assistant

    def answer(self, messages: Sequence[Message], response: str) -> str:
        """Return the text of a response, which continues where the prompt's text ends."""
        del messages
        return self.response + response


PLAIN_FORMATS: Mapping[str, PlainFormat] = {
    "deepspeed_chat": PlainFormat(user=" Human: ", assistant=" Assistant:"),
    "hh_rlhf": PlainFormat(user="\n\nHuman: ", assistant="\n\nAssistant:"),
}
"""The formats of DeepSpeed-Chat and of Anthropic's HH-RLHF; rm-static uses the latter."""
