"""The tokenizer of a model folder, whichever files it is kept in."""

import os
import pathlib
from typing import Any

import tokenizers

from effscale.interop.files.gguf_tokenizer import gguf_tokenizer
from effscale.interop.folder import checked_folder, read_json
from effscale.interop.foreign import reading
from effscale.interop.source import gguf_path
from effscale.interop.tensors import FolderError
from effscale.interop.tokenizer_files import byte_level, tokenizer_json, word_piece


class MissingTokenizerError(FolderError):
    """A folder has no file that a tokenizer could be read from."""


def load_tokenizer(folder: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """The tokenizer that belongs to a model.

    Reads ``tokenizer.json``; without one, ``vocab.txt`` (BERT's WordPiece) or ``vocab.json`` with ``merges.txt`` (the byte-level
    BPE of GPT-2, OPT and others) and the settings and special tokens in the files beside them.

    It encodes texts as ``transformers.AutoTokenizer`` does when it is called with a text and nothing else: whole and unpadded,
    even where ``tokenizer.json`` was saved by a program that had truncation or padding switched on. To cut or pad, call
    ``enable_truncation`` or ``enable_padding`` of the result.

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
        read = tokenizer_json
    elif has("vocab.json", "merges.txt"):
        read = byte_level
    elif has("vocab.txt"):
        read = word_piece
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
    with reading(f"the tokenizer in {str(place)!r} cannot be read", Exception):
        tokenizer = read(place)
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
