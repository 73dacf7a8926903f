"""The tokenizer in a GGUF file: a byte-level BPE."""

import os
from collections.abc import Callable, Mapping

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers, processors

from effscale.interop.foreign import Fields, reading, shown
from effscale.interop.gguf.file import GGUFFile
from effscale.interop.tensors import FolderError

GGML = "tokenizer.ggml."
"""Common prefix of a tokenizer's keys."""

CONTROL, USER_DEFINED = 3, 4
"""Types of tokens that are found in a text before it is split; control tokens are not decoded to text."""

# Llama 3's splitting pattern, as in its tokenizer.json.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _llama3() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3), behavior="isolated")
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, alphabet])


SPLITS: Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _gpt2,
    "smollm": _smollm,
    "llama-bpe": _llama3,
}
"""How a text is split before its pieces are merged, by the file's name for it."""


def gguf_tokenizer(file: GGUFFile | str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """Return the tokenizer of a GGUF file.

    It splits texts like llama.cpp and the model's own ``tokenizer.json``. transformers (5.24) differs in two places. For
    ``smollm``, it does not split off digits first, so of several spaces before a digit it separates the last one. For
    ``llama-bpe``, it merges words that the vocabulary contains as a whole.

    Raises:
        FolderError: The file has no tokenizer, one of another kind (SentencePiece), or one with an unsupported splitting rule.
    """
    file = file if isinstance(file, GGUFFile) else GGUFFile(file)
    with reading(f"the tokenizer of {str(file.header.path)!r} cannot be read", Exception):
        return _tokenizer(str(file.header.path), file.header.fields)


def _tokenizer(path: str, fields: Fields) -> tokenizers.Tokenizer:
    kind = fields.text(f"{GGML}model", None)
    if kind != "gpt2":
        raise FolderError(
            f"{path!r}: the tokenizer must be a byte-level BPE ('gpt2'), the only supported kind in GGUF files, got {shown(kind)}. "
            "Load the tokenizer from the model's Hugging Face folder."
        )
    split = fields.text(f"{GGML}pre", None)
    if split not in SPLITS:
        raise FolderError(
            f"{path!r}: the splitting rule must be one of {', '.join(SPLITS)}, got {shown(split)}. Load the tokenizer "
            "from the model's Hugging Face folder."
        )
    tokens, merges = fields.strings(f"{GGML}tokens"), fields.strings(f"{GGML}merges")
    tokenizer = tokenizers.Tokenizer(_model(path, tokens, merges, whole_words=split == "llama-bpe"))
    tokenizer.pre_tokenizer = SPLITS[split]()
    tokenizer.decoder = decoders.ByteLevel()
    types = fields.values.get(f"{GGML}token_type", np.zeros(0, np.int32))
    if not isinstance(types, np.ndarray):
        raise FolderError(
            f"{path!r}: {GGML}token_type must be a list of numbers, got {shown(types)}."
        )
    _add_tokens(tokenizer, tokens, types)
    _add_ends(tokenizer, path, tokens, fields, begins=split == "llama-bpe")
    return tokenizer


def _model(
    path: str, tokens: list[str], merges: list[str], *, whole_words: bool
) -> tokenizers.models.BPE:
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise FolderError(
            f"{path!r}: its vocabulary contains {len(tokens) - len(vocab)} tokens twice."
        )
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            raise FolderError(f"{path!r}: the merge {merge!r} is not one of its tokens.")
        pairs.append((left, right))
    return tokenizers.models.BPE(vocab, pairs, ignore_merges=whole_words)


def _add_tokens(tokenizer: tokenizers.Tokenizer, tokens: list[str], types: np.ndarray) -> None:
    for kind, add in (
        (CONTROL, tokenizer.add_special_tokens),
        (USER_DEFINED, tokenizer.add_tokens),
    ):
        add(
            [
                AddedToken(token, normalized=False, special=kind == CONTROL)
                for token, its_kind in zip(tokens, types, strict=False)
                if its_kind == kind
            ]
        )


def _add_ends(
    tokenizer: tokenizers.Tokenizer,
    path: str,
    tokens: list[str],
    fields: Fields,
    *,
    begins: bool,
) -> None:
    """Add the begin and end tokens to texts if the file says so; by default, Llama 3's texts begin with one."""
    template, special = ["$A"], []
    for name, default in (("bos", begins), ("eos", False)):
        if not fields.flag(f"{GGML}add_{name}_token", default):
            continue
        index = fields.whole(f"{GGML}{name}_token_id")
        if index >= len(tokens):
            raise FolderError(f"{path!r}: {name}_token_id must be the id of a token, got {index}.")
        special.append((tokens[index], index))
        template.insert(0 if name == "bos" else 2, tokens[index])
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template,
            pair=[*template, *(f"{piece.replace('$A', '$B')}:1" for piece in template)],
            special_tokens=special,
        )
