"""From records to token ids: a tokenizer, a chat format, and the tokens that end and pad a text."""

import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

from effscale.data import separator_id
from effscale.models.validation import did_you_mean
from effscale.rlhf.data.chat import (
    PLAIN_FORMATS,
    ChatTemplate,
    PlainFormat,
    read_chat,
)
from effscale.rlhf.data.record import Message, Record, RecordError, messages_of

Prompt = str | Sequence[Message | Mapping[str, Any]]
ChatFormat = ChatTemplate | PlainFormat


@dataclass(frozen=True, kw_only=True)
class RecordEncoder:
    r"""Encodes prompts and responses.

    A prompt and its response are encoded each by itself, so that the prompt's tokens are those after which a model will go on.
    A response ends in the token that ends a text, put there as a token: its name in a text would be cut into ordinary tokens by
    many tokenizers. Padding is never recognized by its token, which may well be the one that ends a text.

    Attributes:
        tokenizer: The tokenizer. What it puts before a text (OPT's ``</s>``, Llama's ``<s>``) begins every prompt, unless a template
            writes it.
        format: What makes a text of messages: a ``ChatTemplate``, a ``PlainFormat``, or a name in ``PLAIN_FORMATS``.
        end_id: The token that ends a response; None: the tokenizer's usual one.
        pad_id: The token that fills rows up; None: ``end_id``.
        parse_special_tokens: Whether names of special tokens in prompts and responses mean these tokens. By default such a record is
            refused under a chat template, where a message could otherwise forge a turn; and elsewhere they are text like any other.

    Raises:
        ValueError: A field is unknown or out of range, or there is no usual end of a text.

    Example:
        >>> from effscale.data import train_tokenizer
        >>> tokenizer = train_tokenizer([" Human: Name a colour. Assistant: Blue."] * 9, vocab_size=320)
        >>> encoder = RecordEncoder(tokenizer=tokenizer)
        >>> prompt = [{"role": "user", "content": "Name a colour."}]
        >>> tokenizer.decode(encoder.prompt(prompt))
        ' Human: Name a colour. Assistant:'
        >>> tokenizer.decode(encoder.response(prompt, "Blue."), skip_special_tokens=False)
        ' Blue.<|endoftext|>'
    """

    tokenizer: tokenizers.Tokenizer
    format: ChatFormat | str = "deepspeed_chat"
    end_id: int | None = None
    pad_id: int | None = None
    parse_special_tokens: bool = False

    def __post_init__(self):
        if isinstance(self.format, str):
            if self.format not in PLAIN_FORMATS:
                raise ValueError(
                    f"format={self.format!r}: {did_you_mean(self.format, PLAIN_FORMATS)}"
                )
            object.__setattr__(self, "format", PLAIN_FORMATS[self.format])
        if self.end_id is None:
            object.__setattr__(self, "end_id", separator_id(self.tokenizer))
        if self.pad_id is None:
            object.__setattr__(self, "pad_id", self.end_id)
        for name in ("end_id", "pad_id"):
            value = getattr(self, name)
            if value < 0 or self.tokenizer.id_to_token(value) is None:
                raise ValueError(f"{name}={value}: the tokenizer has no such token")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """What ends a response, for ``effscale.generation.SamplingConfig``."""
        return (self._end,)

    @property
    def padding(self) -> int:
        """The token that fills rows up, as a number."""
        return self._end if self.pad_id is None else self.pad_id

    def prompt(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt, up to where the response begins.

        Raises:
            RecordError: A message holds the name of a special token, or the format does not take the messages.
        """
        if isinstance(prompt, str):
            return [*self.beginning, *self._encode(prompt, self.parse_special_tokens)]
        messages = messages_of(prompt, "prompt")
        self._check([m.content for m in messages])
        form = self._form
        ids = self._encode(_told(form.prompt, messages), form.parses_special_tokens)
        return ids if form.parses_special_tokens else [*self.beginning, *ids]

    def response(self, prompt: Prompt, response: str, *, end: bool = True) -> list[int]:
        """The ids of a response.

        Args:
            prompt: What it answers.
            response: Its text.
            end: Whether it ends in ``end_id``.

        Raises:
            RecordError: As for ``prompt``.
        """
        if isinstance(prompt, str):
            ids = self._encode(response, self.parse_special_tokens)
        else:
            self._check([response])
            form, messages = self._form, messages_of(prompt, "prompt")
            text = _told(form.answer, messages, response)
            ids = self._encode(text, form.parses_special_tokens)
        # A template may write the end, and a line break after it, which a model never gets to.
        if self._end in ids:
            ids = ids[: ids.index(self._end)]
        return [*ids, self._end] if end else ids

    def pair(self, record: Record, name: str = "chosen") -> tuple[list[int], list[int]]:
        """The ids of a record's prompt and of one of its responses."""
        return self.prompt(record.prompt), self.response(record.prompt, getattr(record, name))

    @property
    def _form(self) -> ChatFormat:
        return PLAIN_FORMATS[self.format] if isinstance(self.format, str) else self.format

    @property
    def _end(self) -> int:
        return separator_id(self.tokenizer) if self.end_id is None else self.end_id

    @functools.cached_property
    def beginning(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text."""
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
                    f"a message holds {found[0]!r}, the name of a special token; parse_special_tokens=True takes it for that token",
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
        """One that takes names of special tokens for text, and one that takes them for the tokens; the given one stays as it is."""
        pair = []
        for parse in (False, True):
            encoder = tokenizers.Tokenizer.from_str(self.tokenizer.to_str())
            encoder.no_truncation()
            encoder.no_padding()
            encoder.encode_special_tokens = not parse
            pair.append(encoder)
        return pair[0], pair[1]


def load_encoder(
    folder: str | os.PathLike[str],
    *,
    format: ChatFormat | str | None = None,
    end_token: str | None = None,
    pad_token: str | None = None,
    parse_special_tokens: bool = False,
) -> RecordEncoder:
    """The encoder of a model folder or GGUF file: its tokenizer, chat template and special tokens.

    Args:
        folder: The folder.
        format: A chat format in place of the folder's template; None: the template, or, where there is none, ``"deepspeed_chat"``.
        end_token: The token that ends a response, in place of the one that the folder names.
        pad_token: The token that fills rows up, in place of the one that the folder names.
        parse_special_tokens: As in ``RecordEncoder``.

    Raises:
        FolderError: There is no such folder, or a file cannot be read.
        ValueError: The tokenizer has no such token, or none that could end a text.
    """
    found = read_chat(folder)
    tokenizer = found.tokenizer
    chosen = found.chat_template() if format is None else format
    return RecordEncoder(
        tokenizer=tokenizer,
        format="deepspeed_chat" if chosen is None else chosen,
        end_id=found.end_id if end_token is None else separator_id(tokenizer, end_token),
        pad_id=found.pad_id if pad_token is None else separator_id(tokenizer, pad_token),
        parse_special_tokens=parse_special_tokens,
    )


def _told(function: Any, *args: Any) -> str:
    """What a format makes of messages; that it does not take them is an error of this record."""
    try:
        return function(*args)
    except RecordError:
        raise
    except ValueError as error:
        raise RecordError("wrong_type", str(error)) from error
