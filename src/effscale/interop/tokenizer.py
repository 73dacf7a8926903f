"""The tokenizer of a model folder, whichever files it is kept in."""

import os
import pathlib
from typing import Any

import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers, processors

from effscale import data
from effscale.interop.folder import checked_folder, read_json
from effscale.interop.gguf_tokenizer import gguf_tokenizer
from effscale.interop.source import gguf_path
from effscale.interop.tensors import FolderError


class MissingTokenizerError(FolderError):
    """A folder has no file that a tokenizer could be read from."""


def load_tokenizer(folder: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """The tokenizer that belongs to a model.

    Reads ``tokenizer.json``; without one, ``vocab.txt`` (BERT's WordPiece) or ``vocab.json`` with ``merges.txt`` (the byte-level
    BPE of GPT-2, OPT and others).

    Args:
        folder: A model folder, or a GGUF file.

    Raises:
        FolderError: If there is no tokenizer that can be read, or it has tokens for which the model has no embedding.
    """
    place = pathlib.Path(folder)
    gguf = gguf_path(place)
    if gguf is not None:
        return gguf_tokenizer(gguf)
    checked_folder(place)
    has = lambda *names: all((place / name).is_file() for name in names)
    if has("tokenizer.json"):
        read = data.load_tokenizer
    elif has("vocab.json", "merges.txt"):
        read = _byte_level
    elif has("vocab.txt"):
        read = _word_piece
    else:
        there = sorted(entry.name for entry in place.iterdir())
        known = "tokenizer.json, vocab.json with merges.txt, or vocab.txt"
        hint = (
            "; transformers' AutoTokenizer(...).save_pretrained turns tokenizer.model into tokenizer.json"
            if has("tokenizer.model")
            else ""
        )
        raise MissingTokenizerError(
            f"no tokenizer in {str(place)!r} ({known}); it has {there}{hint}"
        )
    try:
        tokenizer = read(place)
    except FolderError:
        raise
    except Exception as error:  # the library raises bare Exception for whatever it cannot read
        raise FolderError(f"the tokenizer in {str(place)!r} cannot be read: {error}") from error
    if has("config.json"):
        rows = read_json(place, "config.json").get("vocab_size")
        check_vocabulary(tokenizer, rows, f"the tokenizer in {str(place)!r}")
    return tokenizer


def check_vocabulary(tokenizer: tokenizers.Tokenizer, rows: Any, what: str) -> None:
    """Raises a FolderError if a tokenizer has ids beyond a model's embeddings, where it has some."""
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if isinstance(rows, int) and size > rows:
        raise FolderError(
            f"{what} has ids up to {size - 1}, and the model has vocab_size={rows} embeddings: resize the "
            "model's (transformers: resize_token_embeddings) or take its own tokenizer"
        )


def _byte_level(place: pathlib.Path) -> tokenizers.Tokenizer:
    model = tokenizers.models.BPE.from_file(str(place / "vocab.json"), str(place / "merges.txt"))
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    known = ("<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>")
    tokenizer.add_special_tokens([t for t in known if tokenizer.token_to_id(t) is not None])
    _add_tokens(tokenizer, place)
    settings = _settings(place)
    if settings.get("add_bos_token"):
        first = settings.get("bos_token", "</s>")
        first = first["content"] if isinstance(first, dict) else first
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A",
            pair=f"{first} $A {first} $B",
            special_tokens=[(first, tokenizer.token_to_id(first))],
        )
    return tokenizer


def _word_piece(place: pathlib.Path) -> tokenizers.Tokenizer:
    words = (place / "vocab.txt").read_text(encoding="utf-8").split("\n")
    vocab = {word.rstrip("\r"): i for i, word in enumerate(words) if word}
    missing = [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in vocab]
    if missing:
        raise FolderError(f"{str(place / 'vocab.txt')!r} has no {', '.join(missing)}")
    settings = _settings(place)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens(
        [t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if t in vocab]
    )
    _add_tokens(tokenizer, place)
    return tokenizer


def _settings(place: pathlib.Path) -> dict[str, Any]:
    name = "tokenizer_config.json"
    return read_json(place, name) if (place / name).is_file() else {}


def _add_tokens(tokenizer: tokenizers.Tokenizer, place: pathlib.Path) -> None:
    """Adds the tokens of ``added_tokens.json``, with the ids that it says."""
    if not (place / "added_tokens.json").is_file():
        return
    for token, wanted in sorted(read_json(place, "added_tokens.json").items(), key=lambda t: t[1]):
        tokenizer.add_special_tokens([token])
        if tokenizer.token_to_id(token) != wanted:
            raise FolderError(
                f"added_tokens.json gives {token!r} the id {wanted}, but the next free one is "
                f"{tokenizer.token_to_id(token)}"
            )
