"""Read tokenizers and their settings: ``tokenizer.json``, GPT-2's ``vocab.json`` with ``merges.txt``, BERT's ``vocab.txt``.

They are read like in transformers 5, including which tokens are special: those that ``tokenizer_config.json`` and
``special_tokens_map.json`` name, by default those of the class, and those that were added to the vocabulary.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors

from effscale import data
from effscale.interop.folder import checked_folder, read_json, read_json_if_there
from effscale.interop.foreign import Fields, reading, shown
from effscale.interop.gguf.tokenizer import gguf_tokenizer
from effscale.interop.source import gguf_path
from effscale.interop.tensors import FolderError

CONFIG, SPECIAL_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
BERT_OPTIONS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
"""Names in ``tokenizer_config.json`` of BERT's text normalization, and names in ``tokenizers``."""

SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
ROLES = tuple(f"{role}_token" for role in SPECIAL)
"""Roles of special tokens, in the order in which transformers adds those that the vocabulary lacks."""

MORE = ("extra_special_tokens", "additional_special_tokens")
"""Names of the list of special tokens without a role; the first that is not empty is used."""

GPT2 = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
BERT = {f"{role}_token": f"[{role.upper()}]" for role in ("unk", "sep", "pad", "cls", "mask")}
"""The special tokens of a folder that names none."""


class MissingTokenizerError(FolderError):
    """A folder has no file from which a tokenizer can be read."""


def load_tokenizer(folder: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """Load the tokenizer of a model.

    It reads ``tokenizer.json`` or, without that, ``vocab.txt`` (BERT's WordPiece) or ``vocab.json`` with ``merges.txt`` (the
    byte-level BPE of GPT-2, OPT and others), together with the settings and special tokens in the files next to them.

    It encodes texts like ``transformers.AutoTokenizer`` called with only a text: untruncated and unpadded, even if
    ``tokenizer.json`` was saved with truncation or padding enabled. To truncate or pad, call ``enable_truncation`` or
    ``enable_padding`` of the result.

    Args:
        folder: A model folder, or a GGUF file.

    Raises:
        FolderError: No readable tokenizer was found, or it has tokens for which the model has no embedding.
    """
    place = pathlib.Path(folder)
    gguf = gguf_path(place)
    if gguf is not None:
        return gguf_tokenizer(gguf)
    checked_folder(place)
    has = lambda *names: all((place / name).is_file() for name in names)
    if has("tokenizer.json"):
        read = tokenizer_json
    elif has("vocab.json", "merges.txt"):
        read = byte_level
    elif has("vocab.txt"):
        read = word_piece
    else:
        there = sorted(entry.name for entry in place.iterdir())
        known = "tokenizer.json, vocab.json with merges.txt, or vocab.txt"
        hint = (
            "; transformers' AutoTokenizer(...).save_pretrained converts tokenizer.model to tokenizer.json"
            if has("tokenizer.model")
            else ""
        )
        raise MissingTokenizerError(
            f"{str(place)!r}: no tokenizer ({known}) was found; the folder contains {there}{hint}"
        )
    with reading(f"the tokenizer in {str(place)!r} cannot be read", Exception):
        tokenizer = read(place)
    if has("config.json"):
        rows = read_json(place, "config.json").get("vocab_size")
        check_vocabulary(tokenizer, rows, f"the tokenizer in {str(place)!r}")
    return tokenizer


def check_vocabulary(tokenizer: tokenizers.Tokenizer, rows: Any, what: str) -> None:
    """Raise a FolderError if a tokenizer has ids beyond a model's embeddings, if it has some."""
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if isinstance(rows, int) and size > rows:
        raise FolderError(
            f"{what} has ids up to {size - 1}, but the model has vocab_size={rows} embeddings. Resize the "
            "model's (transformers: resize_token_embeddings) or use its own tokenizer"
        )


def tokenizer_json(place: pathlib.Path) -> tokenizers.Tokenizer:
    """Read ``tokenizer.json``, with special tokens and text normalization from ``tokenizer_config.json``.

    For the tokenizers of GPT-2 and BERT, the latter takes precedence, as in transformers.
    """
    tokenizer = data.read_tokenizer(place)
    settings = _read_settings(place, {})
    options, named = settings.options, settings.options.text("tokenizer_class", "")
    if isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel) and named.startswith("GPT2"):
        given = options.flag("add_prefix_space", tokenizer.pre_tokenizer.add_prefix_space)
        tokenizer.pre_tokenizer.add_prefix_space = given
    if isinstance(tokenizer.normalizer, normalizers.BertNormalizer) and named.startswith("Bert"):
        for theirs, name in BERT_OPTIONS.items():
            if options.values.get(theirs) is not None:
                setattr(tokenizer.normalizer, name, options.flag(theirs))
    known = tokenizer.get_vocab()
    more = [*settings.added.values(), *settings.special]
    tokenizer.add_tokens([token for token in more if token.content not in known])
    return tokenizer


def byte_level(place: pathlib.Path) -> tokenizers.Tokenizer:
    """Read the byte-level BPE of ``vocab.json`` and ``merges.txt``, as in GPT-2 and OPT."""
    settings = _read_settings(place, GPT2)
    settings.check_class("GPT2Tokenizer")
    model = tokenizers.models.BPE.from_file(str(place / "vocab.json"), str(place / "merges.txt"))
    tokenizer = tokenizers.Tokenizer(model)
    prefixed = settings.options.flag("add_prefix_space", False)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefixed)
    tokenizer.decoder = decoders.ByteLevel()
    settings.add_to(tokenizer)
    first, last = (_end(settings, end) for end in ("bos", "eos"))
    ends = {token: tokenizer.token_to_id(token) for token in (*first, *last)}
    if ends:
        whole = lambda name, kind: [f"{part}:{kind}" for part in (*first, name, *last)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=whole("$A", 0),
            pair=[*whole("$A", 0), *whole("$B", 1)],
            special_tokens=list(ends.items()),
        )
    return tokenizer


def _end(settings: "_Settings", role: str) -> list[str]:
    """Return the token that begins or ends a text, or none."""
    wanted = settings.options.flag(f"add_{role}_token", False)
    return [settings.roles[f"{role}_token"].content] if wanted else []


def word_piece(place: pathlib.Path) -> tokenizers.Tokenizer:
    """Read the WordPiece of ``vocab.txt``, as in BERT."""
    settings = _read_settings(place, BERT)
    settings.check_class("BertTokenizer")
    words = (place / "vocab.txt").read_text(encoding="utf-8").split("\n")
    vocab = {word.rstrip("\r"): i for i, word in enumerate(words) if word}
    unknown, first, last = (settings.roles[f"{r}_token"].content for r in ("unk", "cls", "sep"))
    if missing := [token for token in (unknown, first, last) if token not in vocab]:
        raise FolderError(f"{str(place / 'vocab.txt')!r}: has no {', '.join(missing)}")
    options = settings.options
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=options.flag("do_lower_case", True),
        strip_accents=options.flag("strip_accents", None),
        handle_chinese_chars=options.flag("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[f"{first}:0", "$A:0", f"{last}:0"],
        pair=[f"{first}:0", "$A:0", f"{last}:0", "$B:1", f"{last}:1"],
        special_tokens=[(token, vocab[token]) for token in (first, last)],
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    settings.add_to(tokenizer)
    return tokenizer


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The settings of a tokenizer.

    Attributes:
        options: The fields of ``tokenizer_config.json``.
        roles: The special token of each role.
        more: Special tokens without a role.
        added: Tokens that were added to the vocabulary, by the id that they should have.
    """

    options: Fields
    roles: dict[str, AddedToken]
    more: list[AddedToken]
    added: dict[int, AddedToken]

    @property
    def special(self) -> list[AddedToken]:
        """Return the special tokens with and without a role."""
        return [*self.roles.values(), *self.more]

    def check_class(self, expected: str) -> None:
        """Reject a tokenizer of another class, whose vocabulary may be stored in files with the same names."""
        named = self.options.text("tokenizer_class", expected).removesuffix("Fast")
        if named not in (expected, "PreTrainedTokenizer"):
            raise FolderError(
                f"{self.options.where}: names a {shown(named)}, but without a tokenizer.json only a {expected} can be read; "
                "transformers' AutoTokenizer(...).save_pretrained writes one"
            )

    def add_to(self, tokenizer: tokenizers.Tokenizer) -> None:
        """Add all of them, so that they are found in a text before it is split."""
        for index, token in sorted(self.added.items()):
            tokenizer.add_tokens([token])
            if (found := tokenizer.token_to_id(token.content)) != index:
                raise FolderError(
                    f"{self.options.where}: gives {token.content!r} the id {index}, but the next free one is {found}"
                )
        tokenizer.add_tokens(self.special)


def _read_settings(place: pathlib.Path, defaults: Mapping[str, str]) -> _Settings:
    options = Fields(repr(str(place / CONFIG)), read_json_if_there(place, CONFIG))
    values = {**defaults, **options.values}
    decoder = options.block("added_tokens_decoder", None)
    if decoder is None:
        # The older format; only here do the other two files matter.
        special = read_json_if_there(place, SPECIAL_MAP)
        values |= {role: special[role] for role in ROLES if role in special}
        values = {name: special[name] for name in MORE if name in special} | values
    roles = {r: _token(values[r], options.where) for r in ROLES if values.get(r) is not None}
    more = _without_role(values, options.where)
    words = {token.content for token in (*roles.values(), *more)}
    if decoder is not None:
        added = {int(i): _token(token, decoder.where) for i, token in decoder.values.items()}
    else:
        ids = Fields(repr(str(place / ADDED)), read_json_if_there(place, ADDED))
        added = {
            ids.whole(word): AddedToken(word, normalized=word not in words, special=word in words)
            for word in ids.values
        }
    known = {token.content: token for token in added.values()}
    roles = {role: known.get(token.content, token) for role, token in roles.items()}
    return _Settings(options, roles, [t for t in more if t.content not in known], added)


def special_word(fields: Mapping[str, Any], role: str) -> str | None:
    """Return the special token that a settings file names for a role, if any."""
    token = fields.get(f"{role}_token")
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None


def special_id(fields: Mapping[str, Any], role: str) -> int | None:
    """Return the id of the special token that a config gives for a role, if any: of several, the first is the usual one."""
    number = fields.get(f"{role}_token_id")
    number = number[0] if isinstance(number, list) and number else number
    return number if isinstance(number, int) and not isinstance(number, bool) else None


def _without_role(values: Mapping[str, Any], where: str) -> list[AddedToken]:
    """Return special tokens that are listed, or have a role that only their model knows, such as ``image_token``."""
    listed = next((values[name] for name in MORE if values.get(name)), [])
    if not isinstance(listed, list | dict):
        raise FolderError(f"{where}: special tokens must be a list, got {shown(listed)}")
    own = [
        value
        for name, value in values.items()
        if name.endswith("_token") and name not in ROLES and isinstance(value, str)
    ]
    return [
        _token(t, where) for t in (*own, *(listed.values() if isinstance(listed, dict) else listed))
    ]


def _token(value: Any, where: str) -> AddedToken:
    """Return a token of a settings file: a string, or an object with how it is found in texts."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    if not isinstance(value, dict):
        raise FolderError(f"{where}: a token must be a string or an object, got {shown(value)}")
    fields = Fields(where, value)
    flags = {name: fields.flag(name, False) for name in ("single_word", "lstrip", "rstrip")}
    special = fields.flag("special", True)
    normalized = fields.flag("normalized", not special)
    return AddedToken(fields.text("content"), normalized=normalized, special=special, **flags)
