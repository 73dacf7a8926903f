"""The tokenizer of a model folder, whichever files it is kept in."""

import os
import pathlib
from typing import Any

import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers, processors

from effscale import data
from effscale.interop.folder import read_json
from effscale.interop.gguf_tokenizer import gguf_tokenizer
from effscale.interop.source import gguf_path
from effscale.interop.tensors import FolderError


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
    has = lambda *names: all((place / name).is_file() for name in names)
    if has("tokenizer.json"):
        tokenizer = data.load_tokenizer(place)
    elif has("vocab.json", "merges.txt"):
        tokenizer = _byte_level(place)
    elif has("vocab.txt"):
        tokenizer = _word_piece(place)
    else:
        there = sorted(p.name for p in place.iterdir()) if place.is_dir() else []
        known = "tokenizer.json, vocab.json with merges.txt, or vocab.txt"
        hint = (
            "; transformers' AutoTokenizer(...).save_pretrained turns tokenizer.model into tokenizer.json"
            if has("tokenizer.model")
            else ""
        )
        raise FolderError(f"no tokenizer in {str(place)!r} ({known}); it has {there}{hint}")
    if has("config.json"):
        rows = read_json(place, "config.json").get("vocab_size")
        size = max(tokenizer.get_vocab().values(), default=-1) + 1
        if isinstance(rows, int) and size > rows:
            raise FolderError(
                f"the tokenizer in {str(place)!r} has ids up to {size - 1}, and the model has vocab_size={rows} "
                "embeddings: resize the model's (transformers: resize_token_embeddings) or take its own tokenizer"
            )
    return tokenizer


def _byte_level(place: pathlib.Path) -> tokenizers.Tokenizer:
    model = tokenizers.models.BPE.from_file(str(place / "vocab.json"), str(place / "merges.txt"))
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        t
        for t in ("<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>")
        if tokenizer.token_to_id(t) is not None
    ]
    tokenizer.add_special_tokens(special)
    return tokenizer


def _word_piece(place: pathlib.Path) -> tokenizers.Tokenizer:
    words = (place / "vocab.txt").read_text(encoding="utf-8").split("\n")
    vocab = {word.rstrip("\r"): i for i, word in enumerate(words) if word}
    missing = [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in vocab]
    if missing:
        raise FolderError(f"{str(place / 'vocab.txt')!r} has no {', '.join(missing)}")
    settings: dict[str, Any] = {}
    if (place / "tokenizer_config.json").is_file():
        settings = read_json(place, "tokenizer_config.json")
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
    return tokenizer
