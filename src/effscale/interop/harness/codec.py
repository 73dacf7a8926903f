"""Encode and decode texts like the ``hf`` model of the harness."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import tokenizers

from effscale.data.tokenizer import separator_id
from effscale.interop import load_tokenizer
from effscale.interop.folder import checked_folder, read_json_if_there
from effscale.interop.gguf.file import GGUFFile, gguf_config
from effscale.interop.source import gguf_path
from effscale.interop.tokenizer import special_id, special_word

LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx")
"""The fields of ``config.json`` for the number of tokens that a model reads, in the order in which the harness tries them."""

UNLIMITED = 10**9
"""transformers sets a limit far above this for tokenizers of models without a limit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codec:
    """A tokenizer, with the special tokens and the length that the harness needs.

    Attributes:
        tokenizer: A tokenizer of tokenizers or transformers.
        bos_token_id: The token before a text without context; None if unknown.
        eos_token_id: The token that ends a text; None if unknown.
        add_special_tokens: Whether to add the tokens with which the tokenizer begins and ends texts.
        max_length: The maximum number of tokens that the model reads, if its files or the tokenizer define it.
    """

    tokenizer: Any
    bos_token_id: int | None
    eos_token_id: int | None
    add_special_tokens: bool = True
    max_length: int | None = None

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Return the token ids of a text. If the text already begins with the start token as a word, no other is added."""
        if add_special_tokens is None:
            begins = self.start_text is not None and text.startswith(self.start_text)
            add_special_tokens = self.add_special_tokens and not begins
        encoded = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return list(getattr(encoded, "ids", encoded))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    @functools.cached_property
    def start_text(self) -> str | None:
        """The start token as a word."""
        return self._word(self.bos_token_id)

    @functools.cached_property
    def end_text(self) -> str | None:
        """The end token as a word."""
        return self._word(self.eos_token_id)

    def _word(self, token: int | None) -> str | None:
        if token is None:
            return None
        return self.tokenizer.decode([token], skip_special_tokens=False)


def codec_of(tokenizer: Any) -> Codec:
    """Return the codec of a tokenizer of tokenizers or transformers, or of a model's folder or GGUF file.

    Args:
        tokenizer: A tokenizer, or a path. The token that begins a text is taken from the folder or the tokenizer; without
            one, it is the token that ends a text, as in the harness. A tokenizer of tokenizers defines neither; both are
            then its usual token that divides documents, if it has one.

    Raises:
        FolderError: The folder does not exist, or a file cannot be read.
    """
    if isinstance(tokenizer, str | os.PathLike):
        return _of_folder(pathlib.Path(tokenizer))
    if isinstance(tokenizer, tokenizers.Tokenizer):
        separator = _separator(tokenizer)
        return Codec(tokenizer=tokenizer, bos_token_id=separator, eos_token_id=separator)
    start, end = (getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos"))
    longest = getattr(tokenizer, "model_max_length", None)
    return _codec(tokenizer, start, end, longest)


def _codec(tokenizer: Any, start: int | None, end: int | None, longest: Any) -> Codec:
    limit = int(longest) if isinstance(longest, int) and longest < UNLIMITED else None
    start = end if start is None else start
    return Codec(tokenizer=tokenizer, bos_token_id=start, eos_token_id=end, max_length=limit)


def _of_folder(place: pathlib.Path) -> Codec:
    gguf = gguf_path(place)
    if gguf is not None:
        config, settings = gguf_config(GGUFFile(gguf)), {}
    else:
        checked_folder(place)
        read = functools.partial(read_json_if_there, place)
        config, settings = read("config.json"), read("tokenizer_config.json")
        if "added_tokens_decoder" not in settings:
            # In the older format this file also counts.
            settings = settings | read("special_tokens_map.json")
    tokenizer = load_tokenizer(place)
    words = (special_word(settings, role) for role in ("bos", "eos"))
    start, end = (None if word is None else tokenizer.token_to_id(word) for word in words)
    if start is None and end is None:
        ids = (special_id(config, role) for role in ("bos", "eos"))
        start, end = (None if number is None or number < 0 else number for number in ids)
    if start is None and end is None:
        start = end = _separator(tokenizer)
    longest = next((config[name] for name in LENGTHS if config.get(name) is not None), None)
    return _codec(tokenizer, start, end, longest or settings.get("model_max_length"))


def _separator(tokenizer: tokenizers.Tokenizer) -> int | None:
    try:
        return separator_id(tokenizer)
    except ValueError:
        return None
