"""Encode records to token ids with a tokenizer, a chat format, and the tokens that end and pad a text."""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

from effscale.data.tokenizer import separator_id
from effscale.options import did_you_mean
from effscale.rlhf.data.chat import ChatTemplate, PlainFormat
from effscale.rlhf.data.chat.plain import PLAIN_FORMATS
from effscale.rlhf.data.record import Message, Record, RecordError, messages_of

Prompt = str | Sequence[Message | Mapping[str, Any]]
ChatFormat = ChatTemplate | PlainFormat


@dataclass(frozen=True, kw_only=True)
class RecordEncoder:
    r"""An encoder of prompts and responses.

    A prompt and its response are encoded separately, so that the prompt has the same tokens as during generation. The
    end token of a response is appended as a token id, because many tokenizers would split its name in a text into
    ordinary tokens. Padding is never identified by its token, which may be the same as the end token.

    Attributes:
        tokenizer: The tokenizer. The tokens that it adds before a text (OPT's ``</s>``, Llama's ``<s>``) begin every
            prompt, unless a template writes them.
        format: How messages become text: a ``ChatTemplate``, a ``PlainFormat``, or a name in ``PLAIN_FORMATS``.
        eos_token_id: The token that ends a response; None uses the tokenizer's usual one.
        pad_token_id: The padding token; None uses ``eos_token_id``.
        parse_special_tokens: Whether names of special tokens in prompts and responses are encoded as these tokens. By
            default, such a record raises an error under a chat template, where a message could otherwise forge a
            turn; with other formats the names are ordinary text.

    Raises:
        ValueError: A field is unknown or out of range, or the tokenizer has none of the usual end-of-text tokens.

    Example:
        >>> from effscale.data import train_tokenizer
        >>> tokenizer = train_tokenizer([" Human: Name a color. Assistant: Blue."] * 9, vocab_size=320)
        >>> encoder = RecordEncoder(tokenizer=tokenizer)
        >>> prompt = [{"role": "user", "content": "Name a color."}]
        >>> tokenizer.decode(encoder.prompt(prompt))
        ' Human: Name a color. Assistant:'
        >>> tokenizer.decode(encoder.response(prompt, "Blue."), skip_special_tokens=False)
        ' Blue.<|endoftext|>'
    """

    tokenizer: tokenizers.Tokenizer
    format: ChatFormat | str = "deepspeed_chat"
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    parse_special_tokens: bool = False

    def __post_init__(self):
        if isinstance(self.format, str):
            if self.format not in PLAIN_FORMATS:
                raise ValueError(
                    f"format={self.format!r}: {did_you_mean(self.format, PLAIN_FORMATS)}"
                )
            object.__setattr__(self, "format", PLAIN_FORMATS[self.format])
        if self.eos_token_id is None:
            object.__setattr__(self, "eos_token_id", separator_id(self.tokenizer))
        if self.pad_token_id is None:
            object.__setattr__(self, "pad_token_id", self.eos_token_id)
        for name in ("eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            if value < 0 or self.tokenizer.id_to_token(value) is None:
                raise ValueError(f"{name} must be a token of the tokenizer, got {value}")

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The token ids that end a response, for ``effscale.generation.SamplingConfig``."""
        return (self._end,)

    @property
    def padding(self) -> int:
        """The id of the padding token."""
        return self._end if self.pad_token_id is None else self.pad_token_id

    def prompt(self, prompt: Prompt) -> list[int]:
        """Encode a prompt, up to where the response begins.

        Raises:
            RecordError: A message contains the name of a special token, or the format does not accept the messages.
        """
        if isinstance(prompt, str):
            return [*self.beginning, *self._encode(prompt, self.parse_special_tokens)]
        messages = messages_of(prompt, "prompt")
        self._check([m.content for m in messages])
        form = self._form
        ids = self._encode(_formatted(form.prompt, messages), form.parses_special_tokens)
        return ids if form.parses_special_tokens else [*self.beginning, *ids]

    def response(self, prompt: Prompt, response: str, *, end: bool = True) -> list[int]:
        """Encode a response.

        Args:
            prompt: The prompt that it answers.
            response: The text of the response.
            end: Whether to append ``eos_token_id``.

        Raises:
            RecordError: As for ``prompt``.
        """
        if isinstance(prompt, str):
            ids = self._encode(response, self.parse_special_tokens)
        else:
            self._check([response])
            form, messages = self._form, messages_of(prompt, "prompt")
            text = _formatted(form.answer, messages, response)
            ids = self._encode(text, form.parses_special_tokens)
        # A template may write the end, and a line break after it that a model never generates.
        if self._end in ids:
            ids = ids[: ids.index(self._end)]
        return [*ids, self._end] if end else ids

    def pair(self, record: Record, name: str = "chosen") -> tuple[list[int], list[int]]:
        """Encode a record's prompt and one of its responses."""
        return self.prompt(record.prompt), self.response(record.prompt, getattr(record, name))

    @property
    def _form(self) -> ChatFormat:
        return PLAIN_FORMATS[self.format] if isinstance(self.format, str) else self.format

    @property
    def _end(self) -> int:
        return separator_id(self.tokenizer) if self.eos_token_id is None else self.eos_token_id

    @functools.cached_property
    def beginning(self) -> tuple[int, ...]:
        """The tokens that the tokenizer adds before a text."""
        ids = self.tokenizer.encode("a", add_special_tokens=True).ids
        plain = self.tokenizer.encode("a", add_special_tokens=False).ids
        starts = range(len(ids) - len(plain) + 1)
        place = next((i for i in starts if ids[i : i + len(plain)] == plain), 0)
        return tuple(ids[:place])

    def _check(self, texts: list[str]) -> None:
        if self.parse_special_tokens or not self._form.parses_special_tokens:
            return
        for text in texts:
            if (found := self._names.search(text)) is not None:
                raise RecordError(
                    "special_token",
                    f"a message contains {found[0]!r}, the name of a special token, which is not text to the model. RecordEncoder(parse_special_tokens=True) encodes it as that token",
                )

    @functools.cached_property
    def _names(self) -> re.Pattern[str]:
        added = self.tokenizer.get_added_tokens_decoder().values()
        names = [token.content for token in added if token.special and token.content]
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def _encode(self, text: str, parse: bool) -> list[int]:
        return self._encoders[parse].encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _encoders(self) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
        """Return a tokenizer that treats names of special tokens as text, and one that encodes them as the tokens; the original is unchanged."""
        pair = []
        for parse in (False, True):
            encoder = tokenizers.Tokenizer.from_str(self.tokenizer.to_str())
            encoder.no_truncation()
            encoder.no_padding()
            encoder.encode_special_tokens = not parse
            pair.append(encoder)
        return pair[0], pair[1]


def _formatted(function: Any, *args: Any) -> str:
    """Apply a format to messages; a format that does not accept them is an error of this record."""
    try:
        return function(*args)
    except RecordError:
        raise
    except ValueError as error:
        raise RecordError("wrong_type", str(error)) from error
