"""Read chat settings from a model folder: its template, and the tokens that begin, end and pad texts."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import tokenizers

from effscale.data.tokenizer import separator_id
from effscale.interop.folder import read_json
from effscale.interop.gguf.file import GGUFFile
from effscale.interop.gguf.tokenizer import gguf_tokenizer
from effscale.interop.source import gguf_path
from effscale.interop.tokenizer import SPECIAL, load_tokenizer, special_id, special_word
from effscale.rlhf.data import ChatTemplate, RecordEncoder, TemplateError
from effscale.rlhf.data.encoder import ChatFormat

# GGUF's names for two of them.
_GGUF_ROLES = {"unk": "unknown", "pad": "padding"}


class FolderChat(NamedTuple):
    """The result of ``read_chat``.

    Attributes:
        tokenizer: The tokenizer.
        names: The special tokens by role, such as ``{"eos": "<|im_end|>"}``.
        eos_token_id: The token that ends a text.
        pad_token_id: The padding token; None if the folder does not define one.
        template: The source of the chat template, or several templates as a list of ``name`` and ``template``; None
            if there is none.
    """

    tokenizer: tokenizers.Tokenizer
    names: Mapping[str, str]
    eos_token_id: int
    pad_token_id: int | None
    template: Any

    def chat_template(
        self, name: str = "default", values: Mapping[str, Any] | None = None
    ) -> ChatTemplate | None:
        """Return the chat template; None if there is none.

        Args:
            name: Name of the template, if there are several.
            values: Additional variables for the template, such as ``{"enable_thinking": False}``.

        Raises:
            TemplateError: The template is not a string, or is empty or too long.
            ValueError: There are several templates, and none has that name.
        """
        source = self.template
        if isinstance(source, list):
            named = {
                item["name"]: item["template"]
                for item in source
                if isinstance(item, Mapping) and {"name", "template"} <= item.keys()
            }
            if name not in named:
                raise ValueError(
                    f"name must be one of the folder's chat templates, {', '.join(map(repr, named)) or 'of which there are none'}, got {name!r}"
                )
            source = named[name]
        if source is None:
            return None
        if not isinstance(source, str):
            raise TemplateError(f"the folder's chat template must be a string, got {source!r:.60}")
        tokens = {f"{role}_token": token for role, token in self.names.items()}
        return ChatTemplate(source=source, special_tokens=tokens, values=dict(values or {}))


def load_encoder(
    folder: str | os.PathLike[str],
    *,
    format: ChatFormat | str | None = None,
    end_token: str | None = None,
    pad_token: str | None = None,
    parse_special_tokens: bool = False,
) -> RecordEncoder:
    """Load the encoder of a model folder or GGUF file: its tokenizer, chat template and special tokens.

    Args:
        folder: The folder.
        format: A chat format to use instead of the folder's template. None uses the template, or ``"deepspeed_chat"``
            if there is none.
        end_token: The token that ends a response, instead of the one that the folder defines.
        pad_token: The padding token, instead of the one that the folder defines.
        parse_special_tokens: As in ``RecordEncoder``.

    Raises:
        FolderError: The folder does not exist, or a file cannot be read.
        ValueError: The tokenizer has no such token, or none of the usual end-of-text tokens.
    """
    found = read_chat(folder)
    tokenizer = found.tokenizer
    chosen = found.chat_template() if format is None else format
    return RecordEncoder(
        tokenizer=tokenizer,
        format="deepspeed_chat" if chosen is None else chosen,
        eos_token_id=found.eos_token_id
        if end_token is None
        else separator_id(tokenizer, end_token),
        pad_token_id=found.pad_token_id
        if pad_token is None
        else separator_id(tokenizer, pad_token),
        parse_special_tokens=parse_special_tokens,
    )


def read_chat(folder: str | os.PathLike[str]) -> FolderChat:
    """Load the tokenizer of a model folder or GGUF file, with its chat template and special tokens.

    Special tokens are looked up in ``tokenizer_config.json``, ``special_tokens_map.json``, ``generation_config.json`` and
    ``config.json``, in this order.

    Raises:
        FolderError: The folder does not exist, or a file cannot be read.
        ValueError: No end-of-text token is defined, and the tokenizer has none of the usual ones.
    """
    place = pathlib.Path(folder)
    if (gguf := gguf_path(place)) is not None:
        return _of_gguf(gguf)
    tokenizer = load_tokenizer(place)
    return _chat(tokenizer, _described(place), _template(place))


def _of_gguf(path: pathlib.Path) -> FolderChat:
    file = GGUFFile(path)
    fields = file.header.metadata
    keys = {role: f"tokenizer.ggml.{_GGUF_ROLES.get(role, role)}_token_id" for role in SPECIAL}
    ids = {f"{role}_token_id": fields.get(key) for role, key in keys.items()}
    return _chat(gguf_tokenizer(file), [ids], fields.get("tokenizer.chat_template"))


def _described(place: pathlib.Path) -> list[Mapping[str, Any]]:
    """Return the fields of the files that define special tokens, the most specific file first."""
    names = ("tokenizer_config", "special_tokens_map", "generation_config", "config")
    files = (f"{name}.json" for name in names)
    return [read_json(place, file) for file in files if (place / file).is_file()]


def _template(place: pathlib.Path) -> Any:
    if (file := place / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (place / name).is_file() and (source := read_json(place, name).get("chat_template")):
            return source
    return None


def _chat(
    tokenizer: tokenizers.Tokenizer, described: list[Mapping[str, Any]], template: Any
) -> FolderChat:
    found: dict[str, str] = {}
    ids: dict[str, int] = {}
    for fields in described:
        for role in SPECIAL:
            token, number = special_word(fields, role), special_id(fields, role)
            if token is not None:
                found.setdefault(role, token)
            if number is not None:
                ids.setdefault(role, number)
    for role, number in ids.items():
        token = tokenizer.id_to_token(number) if number >= 0 else None
        if token is not None:
            found.setdefault(role, token)
    known = {role: tokenizer.token_to_id(token) for role, token in found.items()}
    end = known.get("eos")
    end = separator_id(tokenizer) if end is None else end
    return FolderChat(tokenizer, found, end, known.get("pad"), template)
