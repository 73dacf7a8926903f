"""Load the tokenizer of a model folder from any of the supported files."""

import os
import pathlib
from typing import Any

import tokenizers

from effscale.interop.folder import checked_folder, read_json
from effscale.interop.foreign import reading
from effscale.interop.gguf.tokenizer import gguf_tokenizer
from effscale.interop.source import gguf_path
from effscale.interop.tensors import FolderError
from effscale.interop.tokenizer_files import byte_level, tokenizer_json, word_piece


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
